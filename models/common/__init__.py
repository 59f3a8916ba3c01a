"""What two or more of the models need: errors, checkpoints, masks."""
