import pkgutil

import jaxgrpo  # noqa: F401 - makes `envs` mean this project's

# also finds modules in a user's folder of this name, after this project's
__path__ = pkgutil.extend_path(__path__, __name__)
