"""`python -m benchmarks.probes`: see benchmarks.probes.run, which is a module, since processes are spawned from it."""

import sys

from benchmarks.probes.run import main

if __name__ == "__main__":
    sys.exit(main())
