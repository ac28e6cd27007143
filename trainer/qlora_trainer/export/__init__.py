"""What a finished adapter becomes for those who serve it: a merged model, GGUF files, a Modelfile; each proven."""
