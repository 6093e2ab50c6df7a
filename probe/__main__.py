"""`python -m rc_probe`, and the command `rc-probe`."""

import os
import sys


def main() -> None:
    """Run the command. Ctrl-C ends it with one line and exit code 130 from the first import on."""
    try:
        from rc_probe.cli.app import main as run
        from rc_probe.processes.allocator import keep_freed_memory

        keep_freed_memory()
        run()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # of several processes one says it
            sys.stderr.write("rc-probe: interrupted. Nothing was written\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
