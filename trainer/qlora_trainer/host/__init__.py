"""What Linux says about this machine and this process: nothing here knows of training or of torch."""
