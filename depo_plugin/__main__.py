"""`python3 -m depo_plugin COMMAND`: the same as `depo COMMAND`, with the Python and the folder of a launch."""

import sys

from depo_plugin.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
