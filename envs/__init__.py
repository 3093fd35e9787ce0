import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)  # a user's own folder `envs`, too: its modules come after this project's
