from ppcl.cli import main

main()
