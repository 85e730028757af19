"""Makes the config groups of nemo_fp8_recipes visible to every Hydra application in this environment.

Hydra imports each package below the namespace package `hydra_plugins` and asks its search-path plugins for
more directories. Ours goes last, so a group or choice of the application itself always wins:

    python train.py fp8_recipe=mxfp8      # defaults list with `- optional fp8_recipe: null`
    python train.py +fp8_recipe=mxfp8     # any defaults list
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from nemo_fp8_recipes.config.paths import conf_dir

__all__ = ["NemoFp8RecipesSearchPath"]

PROVIDER = "nemo_fp8_recipes"


class NemoFp8RecipesSearchPath(SearchPathPlugin):
    """Appends the directory of our config groups to an application's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider=PROVIDER, path=f"file://{conf_dir()}")
