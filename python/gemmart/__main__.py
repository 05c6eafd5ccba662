import sys

from gemmart.cli import main

sys.exit(main())
