import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lookagain_ext.synthetic.answers import write_answer, write_exercise, write_short_answers
from lookagain_ext.synthetic.grade import evaluate, guessing_rate, held_out, is_right, wilson
from lookagain_ext.synthetic.processor import SceneProcessor, is_scene_processor, letterbox
from lookagain_ext.synthetic.questions import TYPES, Filter, Question, ask, tally
from lookagain_ext.synthetic.scenes import Scene, Shape
from lookagain_ext.synthetic.tiny import (
    build_processor,
    build_tiny,
    encode,
    load_tiny,
    prompt_text,
    save_tiny,
)
from lookagain_ext.synthetic.vocabulary import CELLS, COLOURS, KINDS
from lookagain_ext.template import TAGS, parse

BOARD = Scene(
    (
        Shape("circle", "red", "large", "B2"),
        Shape("circle", "red", "small", "A1"),
        Shape("star", "blue", "small", "D4"),
    )
)
SIZES = {"text_hidden": 64, "text_layers": 1, "vision_hidden": 32, "vision_layers": 1}


@pytest.fixture(scope="module")
def processor() -> SceneProcessor:
    return build_processor()


def test_scene_is_a_function_of_its_seed() -> None:
    assert Scene.random(7) == Scene.random(7)
    assert Scene.random(7) != Scene.random(8)
    one, two = Scene.random(7).render(), Scene.random(7).render()
    assert one.tobytes() == two.tobytes()


def test_every_shape_is_drawn_in_its_cell_and_colour() -> None:
    for seed in range(40):
        scene = Scene.random(seed)
        picture = np.asarray(scene.render(2)).astype(int)
        for cell in CELLS:
            shape = scene.at(cell)
            x, y = "ABCDE".index(cell[0]) + 1, int(cell[1])
            part = picture[y * 56 + 6 : y * 56 + 52, x * 56 + 6 : x * 56 + 52].reshape(-1, 3)
            if shape is None:
                assert np.ptp(part, axis=0).max() == 0
            else:
                tones = np.array(COLOURS[shape.colour])
                near = (np.abs(part[:, None] - tones).max(2) <= 12).any(1)
                assert near.sum() > (50 if shape.size == "small" else 250)


def test_scene_rejects_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="kind must be one of circle"):
        Shape("blob", "red", "small", "A1")
    with pytest.raises(ValueError, match="cell must be one of A1"):
        Shape("circle", "red", "small", "F1")
    with pytest.raises(ValueError, match="share a cell"):
        Scene((Shape("circle", "red", "small", "A1"), Shape("star", "red", "small", "A1")))
    with pytest.raises(ValueError, match="scale"):
        BOARD.render(0)
    with pytest.raises(ValueError, match="most"):
        Scene.random(0, most=26)


def test_tally_and_filter_by_hand() -> None:
    assert tally(Filter(colour="red"), BOARD) == "red shapes: A1 is 1, B2 is 2."
    assert tally(Filter(colour="green", kind="star"), BOARD) == "green stars: none."
    assert [s.cell for s in Filter(size="small").find(BOARD)] == ["A1", "D4"]


def _truth(question: Question, scene: Scene) -> str:
    """The answer worked out from the wording alone, by other means than the generator's."""
    words = question.text.rstrip("?.").split()
    single = [word.removesuffix("s") if word not in COLOURS else word for word in words]

    def meant(part: list[str]) -> list[Shape]:
        found = list(scene.shapes)
        for word in part:
            if word in COLOURS:
                found = [s for s in found if s.colour == word]
            elif word in KINDS:
                found = [s for s in found if s.kind == word]
            elif word in ("small", "large"):
                found = [s for s in found if s.size == word]
            elif word in CELLS:
                found = [s for s in found if s.cell == word]
        return found

    if question.type == "count":
        return str(len(meant(single)))
    if question.type == "existence":
        return "yes" if meant(single) else "no"
    if question.type in ("colour", "kind"):
        (only,) = meant(single)
        return getattr(only, question.type)
    if question.type == "comparison":
        cut = single.index("than" if "than" in single else "outnumber")
        return "yes" if len(meant(single[:cut])) > len(meant(single[cut:])) else "no"
    for side in ("left", "right", "above", "below"):
        if side in words:
            (one,), (other,) = meant(words[: words.index(side)]), meant(words[words.index(side) :])
            gap = {
                "left": other.column - one.column,
                "right": one.column - other.column,
                "above": other.row - one.row,
                "below": one.row - other.row,
            }[side]
            return "yes" if gap > 0 else "no"
    return meant(words)[0].cell


@pytest.mark.parametrize("kind", TYPES)
def test_answers_are_true(kind: str) -> None:
    for seed in range(300):
        scene = Scene.random(seed)
        question = ask(scene, seed, kind)
        assert question.answer == _truth(question, scene), (question, scene)


@pytest.mark.parametrize("kind", TYPES)
def test_written_answers_follow_the_template(kind: str, processor: SceneProcessor) -> None:
    lengths = []
    for seed in range(60):
        question = ask(Scene.random(seed), seed, kind)
        text = write_answer(question, seed)
        parsed = parse(text)
        assert parsed.well_formed, parsed.errors
        assert is_right(text, question)
        assert parsed.reflections == len(question.looks)
        before = text[: text.index("<REFLECTION>")]
        assert not any(look in before for look in question.looks)
        lengths.append(len(processor.tokenizer(text)["input_ids"]))
    assert min(lengths) > 100


def test_exercises_tell_what_reflections_tell() -> None:
    pairs = write_exercise(BOARD, 0, items=200)
    lines = {(given + expected).strip() for given, expected in pairs}
    assert "red shapes: A1 is 1, B2 is 2." in lines
    assert "B2 holds a large red circle." in lines
    assert "blue star: D4 holds a small blue star." in lines


def test_short_answers_are_right() -> None:
    for seed in range(20):
        scene = Scene.random(seed)
        for i, (text, answer) in enumerate(write_short_answers(scene, seed)):
            question = ask(scene, f"{seed}-{i}")
            assert text.strip() == question.text
            assert is_right(answer, question)
            assert all(look in answer for look in question.looks)


def test_unknown_type_is_named() -> None:
    with pytest.raises(ValueError, match="kind must be one of count"):
        ask(BOARD, 0, "weight")


def test_grading() -> None:
    question = Question("colour", "?", "red", "", ())
    assert is_right("<CONCLUSION> Red. </CONCLUSION>", question)
    assert not is_right("<CONCLUSION>dark red</CONCLUSION>", question)
    assert not is_right("red", question)
    low, high = wilson(950, 1000)
    assert low == pytest.approx(0.9347, abs=5e-4) and high == pytest.approx(0.9618, abs=5e-4)
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-9)


def test_guessing_is_far_from_right_and_held_out_is_fresh() -> None:
    pairs = held_out(300)
    rates = guessing_rate(pairs, known=3000)
    assert 0.2 < rates["all"] < 0.5
    assert set(rates) == {*TYPES, "all"}
    assert held_out(3, seed=1) != held_out(3)


def test_tokenizer_round_trips_anything(processor: SceneProcessor) -> None:
    tokenizer = processor.tokenizer
    rng = random.Random(0)
    texts = ["", "naïve 你好 🦓\n\t B7 redder", " <REFLECTION> x", "How many zebras?"]
    texts += ["".join(chr(rng.randrange(32, 0x2FFF)) for _ in range(50)) for _ in range(20)]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for tag in TAGS:
        assert len(tokenizer(tag)["input_ids"]) == 1
        assert tokenizer.decode(tokenizer(tag)["input_ids"], skip_special_tokens=True) == tag
    for word in (" red", " B2", "B2", " circles", " 12", " yes"):
        assert len(tokenizer(word)["input_ids"]) == 1, word


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I", "I;16", "F", "CMYK"])
@pytest.mark.parametrize("size", [(168, 168), (1, 1), (500, 20), (31, 400)])
def test_any_picture_is_accepted(
    mode: str, size: tuple[int, int], processor: SceneProcessor
) -> None:
    inputs = encode(processor, [Image.new(mode, size)], ["What is this?"])
    assert inputs["pixel_values"].shape == (144, 1176)
    assert torch.isfinite(inputs["pixel_values"]).all()
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 36
    assert torch.equal(
        inputs["mm_token_type_ids"], (inputs["input_ids"] == processor.image_token_id).long()
    )


def test_modes_keep_what_is_seen() -> None:
    plain = letterbox(BOARD.render(1), 168)
    clear = BOARD.render(1).convert("RGBA")
    assert letterbox(clear, 168).tobytes() == plain.tobytes()
    assert letterbox(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), 168).getpixel((80, 80)) == (255,) * 3
    deep = Image.fromarray((np.asarray(BOARD.render(1).convert("L")).astype(np.uint16)) * 257)
    grey = BOARD.render(1).convert("L").convert("RGB")
    assert np.abs(np.asarray(letterbox(deep, 168)).astype(int) - np.asarray(grey)).max() <= 1


def test_letterbox_centres_on_white() -> None:
    boxed = np.asarray(letterbox(Image.new("RGB", (100, 50)), 168))
    assert boxed.shape == (168, 168, 3)
    assert (boxed[:40] == 255).all() and (boxed[-40:] == 255).all() and (boxed[84] == 0).all()


def test_processor_rejects_bad_calls(processor: SceneProcessor) -> None:
    with pytest.raises(ValueError, match="0 for 1 pictures"):
        processor(images=BOARD.render(1), text="no place for it")
    with pytest.raises(ValueError, match="text must be"):
        processor(images=BOARD.render(1))
    with pytest.raises(ValueError, match="images must be PIL images, got str"):
        processor(images="picture.png", text=prompt_text("?"))
    with pytest.raises(ValueError, match="side must be a positive multiple of 28"):
        SceneProcessor(processor.image_processor, processor.tokenizer, side=100)


def test_chat_template_and_prompt_agree(processor: SceneProcessor) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    chat = [{"role": "user", "content": content}]
    made = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert made == prompt_text("How many?")


def test_saved_model_answers_the_same(tmp_path: Path, processor: SceneProcessor) -> None:
    model, _ = build_tiny(3, **SIZES)
    for parameter in model.eval().parameters():
        parameter.data = parameter.data.half().float()
    save_tiny(model, processor, tmp_path)
    again, its_processor = load_tiny(tmp_path)
    assert is_scene_processor(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    inputs = encode(its_processor, [BOARD.render(1)] * 2, ["Is there a star?", "Count."])
    expected = encode(processor, [BOARD.render(1)] * 2, ["Is there a star?", "Count."])
    for name, tensor in expected.items():
        assert torch.equal(inputs[name], tensor), name
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    assert again.config.text_config.num_key_value_heads < 4


def test_grades_can_be_compared_question_by_question() -> None:
    model, processor = load_tiny()
    whole = evaluate(model, processor, 6, guess=False)
    empty = evaluate(model, processor, 6, guess=False, empty_reflections=True)
    assert whole.marks.count("1") == round(6 * whole.accuracy) and len(whole.marks) == 6
    assert not whole.guessing and "guessing" not in whole.summary()
    assert whole.mean_reflection_tokens > 5 and whole.seconds > 0
    assert empty.mean_reflections >= 1 and empty.mean_reflection_tokens == 0


def test_load_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not hold a model: there is no config\.json"):
        load_tiny(tmp_path)
    with pytest.raises(ValueError, match=r"holds no preprocessor_config\.json"):
        SceneProcessor.from_pretrained(tmp_path)


def test_the_assistants_tokens_are_told_from_pictures() -> None:
    """As `assistant_only_loss` asks for them; pictures before and between the answers."""
    _, processor = build_tiny(0)
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
        "{% endgeneration %}{% else %}{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}<|im_end|>{% endif %}\n{% endfor %}"
    )
    picture = Scene.random(1).render(1)
    ask = [{"type": "image", "image": picture}, {"type": "text", "text": "How many?"}]
    answers = ["<REFLECTION>two</REFLECTION> 2", "three red squares"]
    for pictures in (1, 2):
        later = [*ask[:1] * (pictures - 1), {"type": "text", "text": "And there?"}]
        chat = [
            {"role": "user", "content": ask},
            {"role": "assistant", "content": answers[0]},
            {"role": "user", "content": later},
            {"role": "assistant", "content": answers[1]},
        ]
        found = processor.apply_chat_template(
            [chat],
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = found["input_ids"][0], found["assistant_masks"][0]
        assert ids.count(processor.image_token_id) == pictures * processor.visual_tokens
        kept = [token for token, one in zip(ids, mask, strict=True) if one]
        wanted = "".join(f"{answer}<|im_end|>" for answer in answers)
        assert kept == processor.tokenizer.encode(wanted)
