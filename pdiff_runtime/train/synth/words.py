"""Word lists of the composed families: all common words, so that each becomes one token."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ITEMS = _words(
    "lamp chair table vase clock mirror basket kettle drum flute violin piano bowl plate cup spoon "
    "fork knife box bag hat coat boot glove scarf belt ring coin key lock door window gate fence "
    "bench shelf desk bed pillow blanket carpet curtain candle lantern tent boat kite ball doll "
    "puzzle pen brush bucket broom ladder hammer saw rope net barrel wheel cart bell flag mask"
)
COLOURS = _words("red blue green yellow black white grey brown pink purple golden silver")
MATERIALS = _words(
    "steel oak glass paper leather cotton wool silk stone clay copper brass pine bamboo rubber wax"
)
CITIES = _words(
    "Oslo Rome Paris London Berlin Madrid Lisbon Vienna Prague Warsaw Athens Cairo Tokyo Seoul "
    "Delhi Lima Quito Havana Boston Chicago Toronto Sydney Dublin Geneva"
)

# Requests that the model was not trained to answer.
REQUESTS = (
    "Write a poem about", "Tell me a story about", "Explain", "Give me advice on",
    "What do you think about", "Write an essay about", "Tell me a joke about", "How do I learn",
    "Summarise a book about", "Translate a text about",
)  # fmt: skip
SUBJECTS = (
    "love", "money", "dogs", "cats", "football", "the moon", "mathematics", "cooking", "music",
    "war", "friendship", "computers", "gravity", "chess", "history", "medicine", "the stars",
    "gardening", "physics", "trains", "my job", "sleep", "running", "painting", "philosophy",
    "birds", "cars", "school", "the future", "tea",
)  # fmt: skip
SYLLABLES = _words("zu bro vi ka lor men tal qui sha dra fel gon plu rex wim yor bax cle nif osk")
ENDINGS = _words("wia dor stan ville land burg mere topia nesia grad")
