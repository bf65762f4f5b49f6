from lahis_tl.cli import main

main()
