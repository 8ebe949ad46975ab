"""`python -m jax_bridge.explain --help`. The function `explain` is defined in `explanation`."""

import sys

from jax_bridge.explanation import explain

if __name__ == "__main__":
    from jax_bridge.command_line import explain_command

    sys.exit(explain_command())

# Importing a module binds it to its name in the package, where the function of that name must stay.
sys.modules[__name__] = explain  # type: ignore[assignment]
