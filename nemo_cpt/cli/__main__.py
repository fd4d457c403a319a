from nemo_cpt.cli import main

if __name__ == "__main__":  # NeMo-Run imports the launcher's main module again, in the job
    main()
