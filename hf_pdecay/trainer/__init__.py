"""The Hugging Face Trainer with p-norm decay: arguments, callbacks, checkpoints, search and the model card."""
