# Read at llama-cpp-python's project(): its lists ask for llama.cpp's helper library as well, which the
# Python package does not load and which takes most of the time to compile.
set(LLAMA_BUILD_COMMON OFF)
