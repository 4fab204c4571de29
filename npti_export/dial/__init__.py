"""The dial: personality sliders for each request, in stock llama.cpp."""
