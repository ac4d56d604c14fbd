"""`python -m emrakul`."""

from emrakul.cli import main

raise SystemExit(main())
