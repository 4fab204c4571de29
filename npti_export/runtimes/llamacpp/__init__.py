"""Models in stock llama.cpp, through the C interface of the library that llama-cpp-python brings; no torch."""
