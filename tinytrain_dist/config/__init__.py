"""What a run is and where it is kept on disk; imports no torch.

Reading order: model_config (the architecture), schema (all settings), conversion and validation (what it accepts),
loading (TOML and command line), run_folder (names and layout of a run on disk), environment_variables.
"""
