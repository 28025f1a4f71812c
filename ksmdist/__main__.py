"""python -m ksmdist"""

from ksmdist.cli import main

main()
