"""LoRA files in stock llama.cpp, by its C API alone, as any other program would use them."""

import ctypes

import numpy as np


def lora_logits(base, adapters, tokens):
    """Logits ``[tokens, vocabulary]`` of a model with LoRA files at their scales, ``{path: scale}``."""
    import llama_cpp as lib

    lib.llama_backend_init()
    settings = lib.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(str(base).encode(), settings)
    assert model, base
    context = None
    try:
        pointers = [lib.llama_adapter_lora_init(model, str(path).encode()) for path in adapters]
        assert all(pointers), list(adapters)
        options = lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = 64
        options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED  # which sums in float16
        options.n_threads = options.n_threads_batch = 1
        context = lib.llama_init_from_model(model, options)
        array = (lib.llama_adapter_lora_p_ctypes * len(pointers))(*pointers)
        scales = (ctypes.c_float * len(pointers))(*adapters.values())
        assert lib.llama_set_adapters_lora(context, array, len(pointers), scales) == 0
        return _decode(lib, model, context, tokens)
    finally:
        if context:
            lib.llama_free(context)
        lib.llama_model_free(model)


def _decode(lib, model, context, tokens):
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        assert lib.llama_decode(context, batch) == 0
        size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        return np.ctypeslib.as_array(lib.llama_get_logits(context), (len(tokens), size)).copy()
    finally:
        lib.llama_batch_free(batch)
