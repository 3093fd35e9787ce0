import pkgutil

# A user's own folder `envs/` is searched after this one.
__path__ = pkgutil.extend_path(__path__, __name__)
