"""What runs on the GPU, in Triton; the modules beside this folder prepare and launch it."""
