"""Parts of every tiny architecture: a partition of the model, the right modules by name, and errors with a mend."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file

from hybridtune.anatomy import Anatomy
from hybridtune.errors import PartError

LANGUAGE_MODELS = {
    "gemma2-lm": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=64,
            vocab_size=100,
        )
    ),
    "gpt2-lm": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=100, bos_token_id=2, eos_token_id=3)
    ),
    "t5-lm": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=32, num_layers=3, num_heads=4, d_kv=8, d_ff=64, vocab_size=100, decoder_start_token_id=0)
    ),
    "encoder-decoder": tiny.encoder_decoder,
}
MODELS = [*tiny.CLASSIFIERS, *LANGUAGE_MODELS]

# model: its stacks, the modules of `embeddings` and of `head`, and the final norms, which belong to neither
OUTLINE = {
    "bert": (["bert.encoder.layer"], ["bert.embeddings"], ["bert.pooler", "classifier"], []),
    "roberta": (["roberta.encoder.layer"], ["roberta.embeddings"], ["classifier"], []),
    "distilbert": (
        ["distilbert.transformer.layer"],
        ["distilbert.embeddings"],
        ["pre_classifier", "classifier"],
        [],
    ),
    "deberta-v2": (
        ["deberta.encoder.layer"],
        ["deberta.embeddings", "deberta.encoder.rel_embeddings"],
        ["pooler", "classifier"],
        [],
    ),
    "modernbert": (["model.layers"], ["model.embeddings"], ["head", "classifier"], ["model.final_norm"]),
    "llama": (["model.layers"], ["model.embed_tokens"], ["score"], ["model.norm"]),
    "qwen3": (["model.layers"], ["model.embed_tokens"], ["score"], ["model.norm"]),
    "gemma": (["model.layers"], ["model.embed_tokens"], ["score"], ["model.norm"]),
    "gpt2": (["transformer.h"], ["transformer.wte", "transformer.wpe"], ["score"], ["transformer.ln_f"]),
    "t5": (
        ["transformer.encoder.block", "transformer.decoder.block"],
        ["transformer.shared", "transformer.encoder.embed_tokens", "transformer.decoder.embed_tokens"],
        ["classification_head"],
        ["transformer.encoder.final_layer_norm", "transformer.decoder.final_layer_norm"],
    ),
    "bart": (
        ["model.encoder.layers", "model.decoder.layers"],
        [
            "model.shared",
            *(
                f"model.{side}.{name}"
                for side in ("encoder", "decoder")
                for name in ("embed_tokens", "embed_positions", "layernorm_embedding")
            ),
        ],
        ["classification_head"],
        [],
    ),
    "gemma2-lm": (["model.layers"], ["model.embed_tokens"], ["lm_head"], ["model.norm"]),
    "gpt2-lm": (["transformer.h"], ["transformer.wte", "transformer.wpe"], ["lm_head"], ["transformer.ln_f"]),
    "t5-lm": (
        ["encoder.block", "decoder.block"],
        ["shared", "encoder.embed_tokens", "decoder.embed_tokens"],
        ["lm_head"],
        ["encoder.final_layer_norm", "decoder.final_layer_norm"],
    ),
    "encoder-decoder": (
        ["encoder.encoder.layer", "decoder.bert.encoder.layer"],
        ["encoder.embeddings", "decoder.bert.embeddings"],
        ["encoder.pooler", "decoder.cls"],
        [],
    ),
}

# model: name of a layer, its blocks and its matrices, below that layer
LAYER = {
    "bert": (
        "layers[1]",
        "bert.encoder.layer.1",
        {"attention": ["attention"], "mlp": ["intermediate", "output"]},
        {
            "attention.q": "attention.self.query",
            "attention.k": "attention.self.key",
            "attention.v": "attention.self.value",
            "attention.o": "attention.output.dense",
            "mlp.up": "intermediate.dense",
            "mlp.down": "output.dense",
        },
    ),
    "distilbert": (
        "layers[1]",
        "distilbert.transformer.layer.1",
        {"attention": ["attention"], "mlp": ["ffn"]},
        {
            "attention.q": "attention.q_lin",
            "attention.k": "attention.k_lin",
            "attention.v": "attention.v_lin",
            "attention.o": "attention.out_lin",
            "mlp.up": "ffn.lin1",
            "mlp.down": "ffn.lin2",
        },
    ),
    "modernbert": (
        "layers[1]",
        "model.layers.1",
        {"attention": ["attn"], "mlp": ["mlp"]},
        {"attention.qkv": "attn.Wqkv", "attention.o": "attn.Wo", "mlp.up": "mlp.Wi", "mlp.down": "mlp.Wo"},
    ),
    "llama": (
        "layers[1]",
        "model.layers.1",
        {"attention": ["self_attn"], "mlp": ["mlp"]},
        {f"attention.{x}": f"self_attn.{x}_proj" for x in "qkvo"}
        | {f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    ),
    "gpt2": (
        "layers[1]",
        "transformer.h.1",
        {"attention": ["attn"], "mlp": ["mlp"]},
        {"attention.qkv": "attn.c_attn", "attention.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    ),
    "t5": (
        "decoder.layers[1]",
        "transformer.decoder.block.1",
        {"attention": ["layer.0"], "cross_attention": ["layer.1"], "mlp": ["layer.2"]},
        {f"attention.{x}": f"layer.0.SelfAttention.{x}" for x in "qkvo"}
        | {f"cross_attention.{x}": f"layer.1.EncDecAttention.{x}" for x in "qkvo"}
        | {"mlp.up": "layer.2.DenseReluDense.wi", "mlp.down": "layer.2.DenseReluDense.wo"},
    ),
    "bart": (
        "decoder.layers[1]",
        "model.decoder.layers.1",
        {"attention": ["self_attn"], "cross_attention": ["encoder_attn"], "mlp": ["fc1", "fc2"]},
        {f"attention.{x}": f"self_attn.{x}_proj" for x in "qkv"}
        | {f"cross_attention.{x}": f"encoder_attn.{x}_proj" for x in "qkv"}
        | {
            "attention.o": "self_attn.out_proj",
            "cross_attention.o": "encoder_attn.out_proj",
            "mlp.up": "fc1",
            "mlp.down": "fc2",
        },
    ),
}
CROSS = ["t5", "bart"]


@cache
def model(name: str) -> hf.PreTrainedModel:
    return LANGUAGE_MODELS[name]() if name in LANGUAGE_MODELS else tiny.classifier(name)


@cache
def anatomy(name: str) -> Anatomy:
    return Anatomy(model(name))


def under(name: str, modules: list[str]) -> set[str]:
    """Names of the parameters below some modules, as PyTorch tells them; of tied ones the first name."""
    first = {id(p): n for n, p in model(name).named_parameters()}
    return {first[id(p)] for module in modules for p in model(name).get_submodule(module).parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_parts_partition_the_model(name: str) -> None:
    stacks, embeddings, head, norms = OUTLINE[name]
    parts = anatomy(name)
    pieces = [set(parts.part(part).parameters) for part in ("embeddings", "layers", "head")] + [under(name, norms)]
    assert [*pieces[:3]] == [under(name, embeddings), under(name, stacks), under(name, head)]
    everything = {n for n, _ in model(name).named_parameters()}
    assert set().union(*pieces) == everything == set(parts.part("all").parameters) == set(parts.parameters)
    twice = {n for n in everything if sum(n in piece for piece in pieces) > 1}
    assert twice <= parts.tied
    assert under(name, norms) <= set(parts.part("norms").parameters)


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_counted_and_ordered(name: str) -> None:
    stacks = OUTLINE[name][0]
    assert anatomy(name).depth == ({"": 3} if len(stacks) == 1 else {"encoder": 3, "decoder": 3})
    assert anatomy(name).part("layers").modules == tuple(f"{stack}.{n}" for stack in stacks for n in range(3))


@pytest.mark.parametrize("name", MODELS)
def test_blocks_hold_every_matrix_of_their_layer(name: str) -> None:
    """A matrix of a layer that no block held would never get LoRA by `layers.attention` and `layers.mlp`."""
    part = anatomy(name).part("layers")
    inside = [matrix for block in part.blocks for matrix in block.matrices]
    assert sorted(inside) == sorted(part.matrices)
    assert len(set(inside)) == len(inside)
    cross = name in (*CROSS, "t5-lm", "encoder-decoder")
    assert len(part.blocks) == (3 * 2 + 3 * 3 if cross else 3 * 2)


@pytest.mark.parametrize("name", LAYER)
def test_blocks_and_projections_by_name(name: str) -> None:
    layer, path, blocks, matrices = LAYER[name]
    parts = anatomy(name)
    for kind, modules in blocks.items():
        part = parts.part(f"{layer}.{kind}")
        names = {key.partition(".")[2]: f"{path}.{m}" for key, m in matrices.items() if key.startswith(f"{kind}.")}
        assert part.modules == tuple(f"{path}.{module}" for module in modules)
        assert set(part.matrices) == set(names.values())
        assert set(part.parameters) == under(name, list(part.modules))
        (block,) = part.blocks
        assert {role: matrix for matrix, role in block.matrices.items()} == names
        first = {"attention": names.get("v", names.get("qkv")), "cross_attention": names.get("q")}
        assert block.input == first.get(kind, next(iter(names.values())))
        assert block.output == names["down" if kind == "mlp" else "o"]
        for projection, matrix in names.items():
            found = parts.part(f"{layer}.{kind}.{projection}")
            assert (found.modules, found.matrices, found.blocks) == ((matrix,), (matrix,), ())
            assert set(found.parameters) == under(name, [matrix])
    projections = {key.partition(".")[2] for key in matrices}
    for projection in projections:  # without naming the block: the same of all blocks
        both = {f"{path}.{m}" for key, m in matrices.items() if key.endswith(f".{projection}")}
        assert set(parts.part(f"{layer}.{projection}").modules) == both


@pytest.mark.parametrize(
    ("index", "numbers"),
    [
        ("", [0, 1, 2]),
        ("[1]", [1]),
        ("[-1]", [2]),
        ("[0:2]", [0, 1]),
        ("[:2]", [0, 1]),
        ("[1:]", [1, 2]),
        ("[-2:]", [1, 2]),
        ("[:-1]", [0, 1]),
        ("[0:-2]", [0]),
        ("[0,2]", [0, 2]),
        ("[0, -1, 2]", [0, 2]),
        ("[2,0]", [2, 0]),
    ],
)
@pytest.mark.parametrize("below", ["", ".mlp.up"])
def test_every_form_of_an_index(index: str, numbers: list[int], below: str) -> None:
    module = {"": "", ".mlp.up": ".intermediate.dense"}[below]
    part = anatomy("bert").part(f"layers{index}{below}")
    assert part.modules == tuple(f"bert.encoder.layer.{number}{module}" for number in numbers)
    assert part.name == str(part) == f"layers{index}{below}"
    assert {block.layer for block in part.blocks} == (set() if below else set(numbers))


@pytest.mark.parametrize("name", CROSS)
def test_a_side_of_an_encoder_decoder(name: str) -> None:
    (encoder, decoder), parts = OUTLINE[name][0], anatomy(name)
    assert parts.part("encoder.layers[-1]").modules == (f"{encoder}.2",)
    assert parts.part("decoder.layers[0:2]").modules == (f"{decoder}.0", f"{decoder}.1")
    assert len(parts.part("layers.cross_attention").blocks) == 3
    assert all(block.stack == "decoder" for block in parts.part("layers.cross_attention").blocks)
    assert set(parts.part("layers.attention").modules) == {
        *parts.part("encoder.layers.attention").modules,
        *parts.part("decoder.layers.attention").modules,
    }


def test_indices_count_in_each_stack() -> None:
    config = hf.BartConfig(d_model=32, encoder_layers=3, decoder_layers=2, vocab_size=100, encoder_attention_heads=4)
    parts = Anatomy(hf.BartForConditionalGeneration(config))
    encoder, decoder = "model.encoder.layers", "model.decoder.layers"
    assert parts.depth == {"encoder": 3, "decoder": 2}
    assert parts.part("layers[-2:]").modules == (f"{encoder}.1", f"{encoder}.2", f"{decoder}.0", f"{decoder}.1")
    with pytest.raises(PartError, match="2 layers, numbered 0 to 1"):
        parts.part("layers[2]")


def test_norms_and_biases() -> None:
    bert, parts = model("bert"), anatomy("bert")
    norms = [n for n, m in bert.named_modules() if isinstance(m, torch.nn.LayerNorm)]
    assert set(parts.part("norms").parameters) == under("bert", norms) == parts.norm_parameters
    assert parts.part("norms").matrices == ()
    biases = {n for n, _ in bert.named_parameters() if n.endswith(".bias")}
    assert set(parts.part("biases").parameters) == biases
    inside = "bert.encoder.layer.2."
    assert set(parts.part("layers[2].norms").parameters) == under("bert", [n for n in norms if n.startswith(inside)])
    assert set(parts.part("layers[2].biases").parameters) == {n for n in biases if n.startswith(inside)}
    assert anatomy("qwen3").part("layers[0].norms").modules == tuple(
        f"model.layers.0.{n}"
        for n in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm")
    )


def test_new_weights_are_those_that_were_named() -> None:
    parts = Anatomy(model("bert"), ["classifier.weight", "classifier.bias", "no.such.weight"])
    assert parts.new == parts.part("new").parameters == ("classifier.weight", "classifier.bias")
    assert parts.part("new").modules == ("classifier",)


def test_a_regular_expression_matches_whole_module_names() -> None:
    parts = anatomy("bert")
    assert parts.part(r"re:.*\.query").modules == tuple(
        f"bert.encoder.layer.{n}.attention.self.query" for n in range(3)
    )
    layer = parts.part(r"re:bert\.encoder\.layer\.1")
    assert set(layer.parameters) == set(parts.part("layers[1]").parameters)
    assert layer.blocks == parts.part("layers[1]").blocks  # so that adapters can sit there
    assert layer.matrices == parts.part("layers[1]").matrices
    assert parts.part(r"re:bert\.encoder\.layer\.[12]\.attention").blocks == parts.part("layers[1:].attention").blocks


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("gpt2-lm", "transformer.wte.weight"),
        ("gemma2-lm", "model.embed_tokens.weight"),
        ("t5-lm", "shared.weight"),
        ("encoder-decoder", "decoder.bert.embeddings.word_embeddings.weight"),
    ],
)
def test_tied_weights_are_one_part_with_two_names(name: str, weight: str) -> None:
    parts = anatomy(name)
    assert weight in parts.tied
    assert weight in parts.part("head").parameters
    assert weight in parts.part("embeddings").parameters
    assert parts.part("all").parameters.count(weight) == 1
    tied = [n for n, m in model(name).named_modules() if m is model(name).get_output_embeddings()]
    assert not {*tied} & {*parts.part("all").matrices}  # an update of the one would be missing from the other


def test_a_part_without_what_others_claimed() -> None:
    part = anatomy("bert").part("layers[0].attention")
    query = "bert.encoder.layer.0.attention.self.query"
    less = part.without({f"{query}.weight", "elsewhere"})
    assert set(part.parameters) - set(less.parameters) == {f"{query}.weight"}
    assert set(part.matrices) - set(less.matrices) == {query}
    assert (less.name, less.blocks) == (part.name, part.blocks)
    assert part.without(()) is part


@pytest.mark.parametrize(
    ("name", "part", "says"),
    [
        ("bert", "layers[0:4]", ["outside the model", "3 layers, numbered 0 to 2", "stay within [0:3]"]),
        ("bert", "layers[3]", ["outside the model", "[-1]"]),
        ("bert", "layers[-4:]", ["outside the model"]),
        ("bert", "layers[0,7]", ["outside the model"]),
        ("bert", "layers[2:1]", ["outside the model"]),
        ("bert", "layers[1:1]", ["outside the model"]),
        ("bert", "layers[]", ["[] is not an index", "[3,7,9]"]),
        ("bert", "layers[last]", ["[last] is not an index", "[-2:]"]),
        ("bert", "embedings", ['did you mean "embeddings"?', "all, embeddings, layers[...]"]),
        ("bert", "layer[0:2]", ['did you mean "layers"?']),
        ("bert", "zebra", ['unknown part "zebra"', "re:<regex>"]),
        ("bert", "layers.atention", ['unknown piece "atention", did you mean "attention"?', "cross_attention"]),
        ("bert", "layers.attention.querry", ['unknown piece "querry"', "q, k, v"]),
        ("bert", "layers.attention.biases", ['unknown piece "biases"', "norms or biases"]),
        ("bert", "layers.attention.mlp", ['unknown piece "mlp"']),
        ("bert", "layers.q.attention", ['unknown piece "attention"']),
        ("bert", "layers.norms.q", ['unknown piece "q"']),
        ("bert", "layers.attention.q.o", ['unknown piece "o"']),
        ("bert", "layers.qkv", ["has none there", "down or k or o or q or up or v"]),
        ("bert", "layers.mlp.q", ["has none there", "down or up"]),
        ("bert", "layers.cross_attention", ["has none there", "attention or mlp"]),
        ("bart", "encoder.layers.cross_attention", ["has none there", "attention or mlp"]),
        ("bert", "encoder.layers[0]", ["is not an encoder-decoder", "write layers[0]"]),
        ("bert", "re:(", ["not a regular expression", "unterminated", "re:.*query"]),
        ("bert", "re:query", ["no module of BertForSequenceClassification", "re:.*query"]),
        ("bert", "re:.*dropout", ["no parameters there", "name another part"]),
        ("llama", "biases", ["LlamaForSequenceClassification has no parameters there"]),
        ("llama", "layers[0].biases", ["no parameters there"]),
        ("bert", "new", ["the checkpoint had every weight", "such as head"]),
    ],
)
def test_an_error_names_the_part_and_the_mend(name: str, part: str, says: list[str]) -> None:
    with pytest.raises(PartError) as caught:
        anatomy(name).part(part)
    message = str(caught.value)
    assert part in message
    assert all(word in message for word in says), message
    assert "mend:" in message or "expected:" in message


def test_a_model_without_a_head_says_so() -> None:
    with pytest.raises(PartError, match="part head: LlamaModel has none"):
        Anatomy(model("llama").model).part("head")


@pytest.mark.parametrize("layers", [[], [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]], ids=["empty", "no attention"])
def test_a_model_without_a_stack_is_refused(layers: list[torch.nn.Module]) -> None:
    with pytest.raises(PartError, match=r"Plain: no stack of layers was found\n.*ModuleList"):
        Anatomy(type("Plain", (torch.nn.ModuleDict,), {})({"layers": torch.nn.ModuleList(layers)}))


@pytest.mark.parametrize("name", ["bert", "gpt2-lm", "t5"])
def test_a_meta_model_has_the_same_parts(name: str) -> None:
    with torch.device("meta"):
        there = Anatomy(LANGUAGE_MODELS[name]() if name in LANGUAGE_MODELS else tiny.classifier(name))
    for part in ("all", "embeddings", "layers[-2:]", "head", "norms"):
        assert there.part(part) == anatomy(name).part(part)


def test_what_an_architecture_fixes_is_in_no_part(tmp_path: Path) -> None:
    """Marian's sinusoids, which transformers does not save, though a loaded model could train them."""
    tiny.language_model("marian").save_pretrained(tmp_path)
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    every = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = set(load_file(tmp_path / "model.safetensors"))
    fixed = {f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")}
    assert every - saved == fixed
    assert set(Anatomy(model).part("all").parameters) == every - fixed
