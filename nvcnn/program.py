"""How a program ends: exit codes, and a rank's failure that takes the whole job down with its own message.

0 done; 2 bad usage or input, one line on stderr; 3 stopped by a signal with everything saved; 1 anything else.
"""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from nvcnn.distributed import abort, launched, wait_for_rank_0
from nvcnn.errors import InputError

BAD_INPUT = 2
SAVED_AND_STOPPED = 3


def run(program: Callable[[], int]) -> NoReturn:
    """Calls `program` and exits with what it returns, or with the code of what it raises."""
    try:
        code = program()
    except InputError as error:
        wait_for_rank_0()
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        abort(BAD_INPUT)
    except KeyboardInterrupt:  # outside of the training loop, which saves
        wait_for_rank_0()
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr, flush=True)
        abort(1)
    except Exception:
        rank = f"rank {launched().rank}: " if launched().size > 1 else ""
        print(f"{rank}{traceback.format_exc()}", end="", file=sys.stderr, flush=True)
        abort(1)
    sys.exit(code)
