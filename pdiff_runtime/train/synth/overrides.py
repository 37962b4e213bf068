"""Tables for the values that the sources do not give in the form we want."""

from __future__ import annotations

# Factbook code -> the one spelling used everywhere, where the sheet's short form will not do.
NAMES = {
    "BF": "Bahamas",
    "BM": "Myanmar",
    "CF": "Congo",
    "CG": "DR Congo",
    "CT": "Central African Republic",
    "CV": "Cape Verde",
    "DR": "Dominican Republic",
    "AE": "United Arab Emirates",
    "FM": "Micronesia",
    "GA": "Gambia",
    "IV": "Ivory Coast",
    "VT": "Vatican City",
    "BK": "Bosnia",
}

# How the sheets name a neighbour, where that is not its one spelling.
NEIGHBOUR_ALIASES = {
    "Burma": "Myanmar",
    "Democratic Republic of the Congo": "DR Congo",
    "Republic of the Congo": "Congo",
    "Cote d'Ivoire": "Ivory Coast",
    "The Gambia": "Gambia",
    "Bosnia and Herzegovina": "Bosnia",
    "Macedonia": "North Macedonia",
    "Holy See": "Vatican City",
    "UAE": "United Arab Emirates",
    "UK": "United Kingdom",
    "US": "United States",
    "Czech Republic": "Czechia",
}

# One capital where the sheet lists several or an older one; empty drops the fact.
CAPITALS = {
    "United States": "Washington",
    "Myanmar": "Naypyidaw",
    "Israel": "",  # disputed
    "Bolivia": "",  # two capitals
    "Nauru": "",  # none by law
    "Sri Lanka": "",  # two capitals
}

# Names where the table is long, misspelt or out of date.
CURRENCIES = {
    "Bulgaria": "euro",  # since 2026, newer than the table
    "Bosnia": "convertible mark",
    "Guyana": "Guyanese dollar",
    "Kyrgyzstan": "Kyrgyz som",
    "Sao Tome and Principe": "Sao Tome dobra",
    "Israel": "Israeli shekel",
    "Trinidad and Tobago": "Trinidad dollar",
    "United Arab Emirates": "Emirati dirham",
    "Vatican City": "euro",
}

LANGUAGE_NAMES = {
    "Bangla": "Bengali",
    "Divehi": "Dhivehi",
    "Nauru": "Nauruan",
    "Nyanja": "Chichewa",
    "Rundi": "Kirundi",
    "Southern Sotho": "Sesotho",
    "Swati": "Swazi",
    "Tuvalu": "Tuvaluan",
}
# Where CLDR lists regional, former or too many languages: after the Factbook; empty drops the
# fact.
LANGUAGES: dict[str, tuple[str, ...]] = {
    "Afghanistan": ("Dari", "Pashto"),
    "Algeria": ("Arabic", "Tamazight"),
    "Australia": ("English",),
    "Bolivia": (),
    "Bosnia": ("Bosnian", "Croatian", "Serbian"),
    "Botswana": ("English",),
    "Burkina Faso": (),
    "Comoros": ("Arabic", "Comorian", "French"),
    "Ecuador": ("Spanish",),
    "Eritrea": (),
    "Ethiopia": (),
    "Iraq": ("Arabic", "Kurdish"),
    "Israel": (),
    "Madagascar": ("French", "Malagasy"),
    "Mali": (),
    "Mauritius": (),
    "Mexico": ("Spanish",),
    "Montenegro": ("Montenegrin",),
    "Morocco": ("Arabic", "Tamazight"),
    "New Zealand": ("English", "Maori"),
    "Niger": (),
    "Nigeria": ("English",),
    "Norway": ("Norwegian",),
    "Peru": ("Aymara", "Quechua", "Spanish"),
    "Rwanda": ("English", "French", "Kinyarwanda", "Swahili"),
    "Seychelles": ("Creole", "English", "French"),
    "South Africa": (),
    "Switzerland": ("French", "German", "Italian", "Romansh"),
    "Taiwan": (),
    "Tunisia": ("Arabic",),
    "United States": ("English",),
    "Vatican City": (),
    "Zimbabwe": (),
}

# Old phrase -> new phrase, in this order.
SIZE_PHRASES = {
    "1.5 times": "one and a half times",
    "2.5 times": "two and a half times",
    "3.5 times": "three and a half times",
    "state of Washington": "Washington State",
    "York state": "York State",
    "D.C": "DC",
    "Washington, ": "Washington ",
    "two times": "twice",
    "about the same size as": "about the size of",
    "almost identical in size to": "about the size of",
}

# The sheet's text in a few words, where its first clause is long or says too little.
CLIMATES = {
    "Andorra": "temperate with snowy winters and warm summers",
    "Angola": "semiarid in the south and along the coast",
    "Armenia": "highland continental with hot summers and cold winters",
    "Bahrain": "arid with mild winters and hot summers",
    "Belarus": "cold in winter, cool and moist in summer",
    "Benin": "tropical in the south, semiarid in the north",
    "Bhutan": "tropical in the southern plains, severe in the mountains",
    "Bolivia": "humid and tropical to cold and semiarid",
    "Bosnia": "hot in summer and cold in winter",
    "Bulgaria": "temperate with cold winters and hot summers",
    "Burkina Faso": "tropical in the south, semiarid in the north",
    "Central African Republic": "tropical with dry winters and wet summers",
    "Chile": "temperate, desert in the north",
    "China": "tropical in the south, subarctic in the north",
    "Cyprus": "temperate with hot, dry summers and cool winters",
    "Czechia": "temperate with cool summers and cold winters",
    "Djibouti": "torrid, dry desert",
    "Ecuador": "tropical along the coast, cooler inland",
    "Egypt": "hot, dry desert",
    "Eritrea": "hot desert on the coast, cooler in the highlands",
    "Estonia": "maritime with wet winters and cool summers",
    "Eswatini": "tropical to near temperate",
    "Ethiopia": "tropical monsoon with wide variation",
    "France": "cool in winter and mild in summer",
    "Greece": "temperate with mild winters and hot, dry summers",
    "Guatemala": "tropical, cooler in the highlands",
    "Hungary": "temperate with cold winters and warm summers",
    "Iceland": "temperate with windy winters and cool summers",
    "Iran": "mostly arid or semiarid",
    "Kazakhstan": "continental with cold winters and hot summers",
    "Kosovo": "continental with cold winters and hot, dry summers",
    "Kuwait": "dry desert with hot summers and cool winters",
    "Kyrgyzstan": "dry continental to polar",
    "Latvia": "maritime with wet, moderate winters",
    "Lebanon": "Mediterranean with wet winters and hot, dry summers",
    "Lesotho": "temperate with dry winters and wet summers",
    "Libya": "Mediterranean along the coast, desert inland",
    "Liechtenstein": "continental with cold, cloudy winters",
    "Luxembourg": "continental with mild winters and cool summers",
    "Malawi": "subtropical",
    "Malta": "Mediterranean with mild winters and hot, dry summers",
    "Mauritania": "hot, dry, dusty desert",
    "Mauritius": "tropical, modified by trade winds",
    "Mexico": "tropical to desert",
    "Moldova": "moderate in winter and warm in summer",
    "Monaco": "Mediterranean with wet winters and hot, dry summers",
    "Montenegro": "Mediterranean with hot, dry summers",
    "Morocco": "Mediterranean in the north, hot desert in the south",
    "Namibia": "hot, dry desert",
    "Nepal": "cool in the north, subtropical in the south",
    "Niger": "hot, dry, dusty desert",
    "Nigeria": "equatorial in the south, arid in the north",
    "North Korea": "temperate with long, bitter winters",
    "North Macedonia": "warm and dry in summer, cold and snowy in winter",
    "Norway": "temperate along the coast, colder in the interior",
    "Poland": "temperate with cold winters and mild summers",
    "Qatar": "arid with mild winters and hot summers",
    "Romania": "temperate with cold winters and sunny summers",
    "Russia": "steppe in the south, subarctic in Siberia",
    "Saint Kitts and Nevis": "tropical, tempered by sea breezes",
    "Saint Lucia": "tropical, moderated by trade winds",
    "San Marino": "Mediterranean with warm, sunny summers",
    "Saudi Arabia": "harsh, dry desert",
    "Serbia": "continental in the north",
    "Slovakia": "temperate with cool summers and cold winters",
    "Slovenia": "Mediterranean on the coast, continental inland",
    "South Korea": "temperate with rainy summers and cold winters",
    "South Sudan": "hot with seasonal rainfall",
    "Sweden": "temperate in the south, subarctic in the north",
    "Tajikistan": "continental with hot summers and mild winters",
    "Togo": "tropical in the south, semiarid in the north",
    "Tunisia": "temperate in the north, desert in the south",
    "Turkey": "temperate with hot, dry summers and mild winters",
    "United Arab Emirates": "desert, cooler in the eastern mountains",
    "United States": "mostly temperate",
    "Uzbekistan": "mostly desert with long, hot summers",
    "Vatican City": "temperate with mild, rainy winters",
    "Vietnam": "tropical in the south, monsoonal in the north",
}

# Shorter names of goods.
GOODS = {
    "packaged medicine": "medicine", "packaged medicines": "medicine",
    "unpackaged medicine": "medicine", "vehicle parts/accessories": "car parts",
    "coconuts/brazil nuts/cashews": "nuts", "industrial acids/oils/alcohols": "industrial oils",
    "postage stamps/documents": "postage stamps", "processed crustaceans": "crustaceans",
    "processed fruits and nuts": "fruits", "medical cultures/vaccines": "vaccines",
    "precious metal ore": "metal ore", "broadcasting equipment": "radio equipment",
    "chemical analysis instruments": "instruments", "wheat flours": "flour",
    "nutmeg/cardamons": "nutmeg", "jewelry": "jewellery",
}  # fmt: skip
