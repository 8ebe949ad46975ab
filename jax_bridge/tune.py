"""`python -m jax_bridge.tune --help`. The function `tune` is defined in `tuning`."""

import sys

from jax_bridge.tuning import tune

if __name__ == "__main__":
    from jax_bridge.command_line import tune_command

    sys.exit(tune_command())

# Importing a module binds it to its name in the package, where the function of that name must stay.
sys.modules[__name__] = tune  # type: ignore[assignment]
