"""Two captions per clip, in varied wording: what a silent viewer sees, what a listener hears.

The paper trains with a caption of the silent video and a caption of the sound alone, so neither
may leak into the other: no colours, shapes or motion in the audio caption, no sound words in the
video caption (tests/playground/test_world.py holds both lists).
"""

import numpy as np

NUMBERS = {1: ("one", "a single"), 2: ("two", "a pair of"), 3: ("three", "a group of three")}
LOOKS = {
    "rubber": ("matte rubber", "dull rubber", "plain rubber"),
    "wood": ("striped wooden", "grainy wooden", "wooden"),
    "metal": ("shiny metal", "polished metal", "gleaming metal"),
    "glass": ("clear glass", "see-through glass", "transparent glass"),
}
MOTIONS = {
    "drop": ("{s} and bounce{e}", ("drop", "fall", "tumble"), " on the floor"),
    "throw_left": ("{s} to the left and bounce{e}", ("fly", "shoot", "move"), " off the walls"),
    "throw_right": ("{s} to the right and bounce{e}", ("fly", "shoot", "move"), " off the walls"),
    "toss": ("{s} upwards, then come{e} down", ("leap", "jump", "spring"), " again"),
}
PLACES = ("in a {b} box", "inside a {b} room", "in front of a {b} wall", "against a {b} background")
AMBIENT_VIDEO = {
    "rain": (
        "{Weak} rain falls in streaks past a dark sky.",
        "Streaks of {weak} rain come down over wet ground.",
        "A dark sky with {weak} rain falling.",
    ),
    "wind": (
        "Tall green reeds sway {weak} under a pale sky.",
        "Green grass bends {weak} from side to side.",
        "A row of tall reeds swings {weak} in front of a pale sky.",
    ),
    "clouds": (
        "White clouds drift {weak} across a blue sky.",
        "A blue sky with white clouds that move {weak}.",
        "Clouds glide {weak} over a bright blue sky.",
    ),
}
VIDEO_WEAK = {
    "rain": ("light", "heavy"), "wind": ("gently", "strongly"), "clouds": ("slowly", "quickly")
}
HITS = {
    "rubber": ("thud", "bounce", "thump"),
    "wood": ("knock", "clack", "tap"),
    "metal": ("clang", "ring", "chime"),
    "glass": ("clink", "tinkle", "ping"),
}
ADJECTIVES = {"rubber": "rubber", "wood": "wooden", "metal": "metal", "glass": "glass"}
AMBIENT_AUDIO = {
    "rain": ("{Weak} rain patters steadily.", "The hiss of {weak} rain.", "{Weak} rainfall."),
    "wind": ("{Weak} wind blows in gusts.", "Gusts of {weak} wind.", "{Weak} wind howls."),
    "clouds": (
        "{Weak} birds chirp over a faint breeze.",
        "Chirping of {weak} birds outdoors.",
        "A quiet breeze and the song of {weak} birds.",
    ),
}
AUDIO_WEAK = {
    "rain": ("light", "heavy"), "wind": ("gentle", "strong"), "clouds": ("a few", "many")
}


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def balls_video(
    rng: np.random.Generator, colours: list[str], material: str, motion: str, scene: str
) -> str:
    """Colours, count, look of the material, motion and backdrop; nothing that one hears."""
    look, place = _pick(rng, LOOKS[material]), _pick(rng, PLACES).format(b=scene)
    pattern, verbs, tail = MOTIONS[motion]
    verb = _pick(rng, verbs)
    if len(colours) == 1:
        subject = _article(f"{colours[0]} {look} ball")
        third_person = "flies" if verb == "fly" else verb + "s"
        action = pattern.format(s=third_person, e="s") + tail
    else:
        count = _pick(rng, NUMBERS[len(colours)])
        if rng.uniform() < 0.5:
            subject = f"{count} {look} balls, {_join(colours)},"
        else:
            subject = f"{count} {look} balls coloured {_join(colours)}"
        action = pattern.format(s=verb, e="") + tail
    if rng.uniform() < 0.3:
        return _sentence(f"{place}, {subject} {action}.")
    return _sentence(f"{subject} {action} {place}.")


def how_many(events: int) -> str:
    """Rough number words a listener would use."""
    for limit, word in ((1, "a single"), (4, "a few"), (9, "several")):
        if events <= limit:
            return word
    return "many"


def balls_audio(
    rng: np.random.Generator, material: str, loudness: list[float]
) -> str:
    """Material of the impacts, roughly how many and how loud; nothing that one sees."""
    many = how_many(len(loudness))
    loud = "loud" if max(loudness) > 0.5 else "soft"
    hit, kind = _pick(rng, HITS[material]), ADJECTIVES[material]
    noun = hit if many == "a single" else hit + "s"
    options = (
        f"{many} {loud} {kind} {noun}.",
        f"{many} {loud} {noun} of {'wood' if kind == 'wooden' else kind}.",
        f"{many} {kind} {noun}, {loud} at first and fading.",
        f"The sound of {many} {loud} {kind} {noun}.",
    )
    return _sentence(_pick(rng, options))


def ambient(rng: np.random.Generator, scene: str, strength: float) -> tuple[str, str]:
    """Video and audio caption of an ambient scene with `strength` in [0,1]."""
    level = int(strength > 0.5)
    captions = []
    for templates, words in ((AMBIENT_VIDEO, VIDEO_WEAK), (AMBIENT_AUDIO, AUDIO_WEAK)):
        word = words[scene][level]
        captions.append(_pick(rng, templates[scene]).format(weak=word, Weak=_sentence(word)))
    return captions[0], captions[1]
