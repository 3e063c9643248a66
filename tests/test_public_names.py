"""What users import, and where from: a name that goes away, or moves, breaks their programs."""

import importlib

import pytest

NAMES = {
    "igpt_fast": """
        BackendUnavailableError DynamicCache Generation ImageGPTConfig ImageGPTFeatureExtractor
        ImageGPTForCausalImageModeling ImageGPTForCausalLM ImageGPTForImageClassification ImageGPTImageProcessor
        ImageGPTImageProcessorFast ImageGPTImageProcessorPil ImageGPTModel ImageGPTTokenizer Pipeline Scores StaticCache
        __version__ backend center_crop
        dequantize fit_clusters get_backend hf image image_grid load_clusters open_image ops quantize reference resize
        save_animation save_clusters save_image set_backend show_config to_rgb use_backend""",
    "igpt_fast.image": """
        BatchFeature ImageGPTImageProcessor MAX_PIXELS center_crop check_animation dequantize fit_clusters image_grid
        load_clusters open_image quantize resize save_animation save_clusters save_image to_pil to_rgb""",
    "igpt_fast.model": """
        ImageGPTForCausalImageModeling ImageGPTForImageClassification ImageGPTModel ImageGPTPreTrainedModel""",
    "igpt_fast.checkpoint": "from_openai",
    "igpt_fast.hf": """
        Served accelerate accelerated from_transformers linear_layers register restore to_transformers unregister""",
    "igpt_fast.ops": """
        ACTIVATIONS activation attention_decode causal_attention causal_attention_packed check_activation check_sampling
        cross_entropy dequantize gelu_erf gelu_tanh gemv layer_norm quantize quick_gelu rms_norm sample sample_next
        sample_settings sample_step""",
    "igpt_fast.reference": """
        attention_decode causal_attention cross_entropy dequantize dequantize_values gelu_erf gelu_tanh gemv layer_norm
        quantize quantize_values quick_gelu rms_norm sample sample_next sample_step uniform""",
    "igpt_fast.backend": "BackendUnavailableError get_backend set_backend show_config use_backend",
    "igpt_fast.config": "ImageGPTConfig",
    "igpt_fast.pipeline": "BUNDLED Generation Options Pipeline RowEvent Scores kept_rows",
}


@pytest.mark.parametrize("module", NAMES)
def test_the_names_are_there(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


def test_a_star_import_brings_all_of_them() -> None:
    import igpt_fast

    assert set(NAMES["igpt_fast"].split()) <= set(igpt_fast.__all__) <= set(dir(igpt_fast))
