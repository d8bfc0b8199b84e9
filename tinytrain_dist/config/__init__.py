"""The settings of a run, how they are read and checked, and the names of its files; imports no torch.

Reading order: model_config (the architecture), schema (all settings), type_conversion and validation (types and allowed
values), loading (TOML and command line), run_folder (names and layout of a run on disk), environment_variables.
"""
