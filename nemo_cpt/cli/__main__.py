from nemo_cpt.cli import main

main()
