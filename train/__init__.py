"""The training application: `python -m train --config FILE`."""
