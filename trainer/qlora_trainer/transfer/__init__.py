"""Files between a workspace and the Hugging Face Hub or S3: a process of its own, which never imports torch."""
