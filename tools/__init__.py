import pkgutil

import jaxgrpo  # noqa: F401 - has `envs` mean this project's

# a user's own folder of this name, too: its modules come after this project's
__path__ = pkgutil.extend_path(__path__, __name__)
