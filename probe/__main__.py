"""`python -m rc_probe`, and the command `rc-probe`."""

from rc_probe.cli import main

if __name__ == "__main__":
    main()
