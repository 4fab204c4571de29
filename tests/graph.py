"""Named nodes of llama.cpp's graph while it runs a model, by its own callback: ctypes only."""

import ctypes

import numpy as np


def _library():
    import llama_cpp._ctypes_extensions as loader
    import llama_cpp._ggml as bundled

    library = loader.load_shared_library("ggml-base", bundled.libggml_base_path)
    library.ggml_get_name.restype = ctypes.c_char_p
    for function in (library.ggml_nbytes, library.ggml_element_size):
        function.restype = ctypes.c_size_t
    library.ggml_get_data.restype = ctypes.c_void_p
    for function in (library.ggml_get_name, library.ggml_nbytes, library.ggml_get_data):
        function.argtypes = [ctypes.c_void_p]
    return library


def nodes(path, tokens, wanted):
    """Values of the wanted F32 nodes, in the order in which they were computed: ``[(name, [rows, columns])]``."""
    import llama_cpp

    ggml, found, failures = _library(), [], []

    @llama_cpp.ggml_backend_sched_eval_callback
    def seen(tensor, ask, _):
        try:
            name = ggml.ggml_get_name(tensor).decode()
            if ask:
                return name in wanted
            columns = ctypes.c_int64.from_address(tensor + 16).value  # ne[0] in struct ggml_tensor, ggml.h
            data = ctypes.string_at(ggml.ggml_get_data(tensor), ggml.ggml_nbytes(tensor))
            found.append((name, np.frombuffer(data, np.float32).reshape(-1, columns)))
        except Exception as error:  # an exception that leaves a callback is lost
            failures.append(error)
        return True

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise ValueError(f"llama.cpp cannot load {path}")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 64
    settings.n_threads = settings.n_threads_batch = 1
    settings.cb_eval = seen
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        assert llama_cpp.llama_decode(context, batch) == 0
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    if failures:
        raise failures[0]
    return found
