"""Extraction to JSON: a text, a description of the wanted object, and the object."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from training.aspen import banks
from training.aspen.exercise import Draw, Exercise, Message, assistant, is_json, user

Value = object


@dataclass(frozen=True, slots=True)
class Field:
    """One key of the wanted object: its schema, its value, and the sentence that states it."""

    key: str
    schema: dict[str, object]
    value: Value
    sentence: str


STRING: dict[str, object] = {"type": "string"}
INTEGER: dict[str, object] = {"type": "integer"}
NUMBER: dict[str, object] = {"type": "number"}
BOOLEAN: dict[str, object] = {"type": "boolean"}


def person_fields(draw: Draw) -> list[Field]:
    """Everything about one person."""
    name = draw.person()
    city, job, age = draw.of(banks.CITIES), draw.of(banks.JOBS), draw.number(18, 90)
    hobbies = draw.distinct(banks.HOBBIES, draw.number(1, 3))
    married = draw.chance(0.5)
    street, house = draw.of(banks.PLAIN_WORDS).capitalize(), draw.number(1, 99)
    email = f"{name.split()[0].lower()}@{draw.of(banks.COMPANIES).lower()}.com"
    level = draw.one("junior", "senior", "lead")
    return [
        Field(
            draw.one("name", "full_name", "person"),
            STRING,
            name,
            draw.one(f"My name is {name}.", f"This is about {name}.", f"{name} wrote to us."),
        ),
        Field("age", INTEGER, age, draw.one(f"The age is {age}.", f"{name} is {age} years old.")),
        Field(
            draw.one("city", "city", "home", "location"),
            STRING,
            city,
            draw.one(f"{name} lives in {city}.", f"The home town is {city}."),
        ),
        Field(
            draw.one("job", "profession", "occupation"),
            STRING,
            job,
            f"{name} works as {'an' if job[0] in 'aeiou' else 'a'} {job}.",
        ),
        Field("email", STRING, email, draw.one(f"The email address is {email}.", f"Write to {email}.")),
        Field("hobbies", {"type": "array", "items": STRING}, hobbies, f"{name} likes {' and '.join(hobbies)}."),
        Field("married", BOOLEAN, married, f"{name} is {'married' if married else 'not married'}."),
        Field("level", {"type": "string", "enum": ["junior", "senior", "lead"]}, level, f"The level is {level}."),
        Field(
            "address",
            {"type": "object", "properties": {"street": STRING, "number": INTEGER}, "required": ["street", "number"]},
            {"street": f"{street} Street", "number": house},
            f"The address is {house} {street} Street.",
        ),
    ]


def product_fields(draw: Draw) -> list[Field]:
    """Everything about one article of a shop."""
    thing, colour = draw.of(banks.OBJECTS), draw.of(banks.COLOURS)
    price: int | float = draw.number(2, 500) if draw.chance(0.6) else draw.number(100, 9999) / 100
    quantity, stocked = draw.number(0, 200), draw.chance(0.5)
    size, tags = draw.one("small", "medium", "large"), draw.distinct(banks.ADJECTIVES, draw.number(1, 3))
    maker = draw.of(banks.COMPANIES)
    return [
        Field(
            draw.one("name", "product", "item", "title"),
            STRING,
            thing,
            draw.one(f"We sell a {thing}.", f"The product is a {thing}.", f"This is a {thing}."),
        ),
        Field(
            draw.one("price", "cost"),
            NUMBER,
            price,
            draw.one(f"The {thing} costs {price} euros.", f"The price is {price} euros."),
        ),
        Field(draw.one("color", "colour"), STRING, colour, draw.one(f"Its colour is {colour}.", f"It is {colour}.")),
        Field(draw.one("quantity", "count", "stock"), INTEGER, quantity, f"There are {quantity} pieces."),
        Field(
            draw.one("in_stock", "available"), BOOLEAN, stocked, f"It is {'available' if stocked else 'not available'}."
        ),
        Field("size", {"type": "string", "enum": ["small", "medium", "large"]}, size, f"The size is {size}."),
        Field(draw.one("brand", "maker", "company"), STRING, maker, f"It is made by {maker}."),
        Field("tags", {"type": "array", "items": STRING}, tags, f"It is tagged as {' and '.join(tags)}."),
    ]


def event_fields(draw: Draw) -> list[Field]:
    """Everything about one event."""
    event = draw.one(
        "concert", "meeting", "party", "exam", "match", "wedding", "lecture", "workshop", "market", "festival"
    )
    city, day, guests = draw.of(banks.CITIES), draw.of(banks.DAYS), draw.number(2, 900)
    month, number, year = draw.number(1, 12), draw.number(1, 28), draw.number(2020, 2030)
    time, free = f"{draw.number(8, 22):02d}:{draw.one('00', '15', '30', '45')}", draw.chance(0.5)
    host, speakers = draw.person(), draw.distinct(banks.FIRST_NAMES, draw.number(1, 3))
    return [
        Field(
            draw.one("event", "title", "name"),
            STRING,
            event,
            draw.one(f"There will be a {event}.", f"You are invited to a {event}."),
        ),
        Field(
            draw.one("city", "place", "location"),
            STRING,
            city,
            draw.one(f"It takes place in {city}.", f"The {event} is in {city}."),
        ),
        Field("day", STRING, day, f"It is on {day}."),
        Field("date", STRING, f"{year}-{month:02d}-{number:02d}", f"The date is {year}-{month:02d}-{number:02d}."),
        Field(
            draw.one("time", "start"), STRING, time, draw.one(f"It starts at {time}.", f"The {event} begins at {time}.")
        ),
        Field(draw.one("guests", "participants"), INTEGER, guests, f"We expect {guests} people."),
        Field("free", BOOLEAN, free, "The entry is free." if free else "The entry is not free."),
        Field(draw.one("host", "organizer"), STRING, host, f"The host is {host}."),
        Field(
            "speakers",
            {"type": "array", "items": STRING},
            speakers,
            f"The speakers are {' and '.join(speakers)}." if len(speakers) > 1 else f"The speaker is {speakers[0]}.",
        ),
    ]


def order_fields(draw: Draw) -> list[Field]:
    """An order of several articles."""
    customer, number, paid = draw.person(), draw.number(100, 99999), draw.chance(0.5)
    items = [
        {"product": thing, "quantity": draw.number(1, 20)} for thing in draw.distinct(banks.OBJECTS, draw.number(1, 3))
    ]
    status, city = draw.one("open", "shipped", "done"), draw.of(banks.CITIES)
    told = " and ".join(f"{item['quantity']} x {item['product']}" for item in items)
    item_schema = {
        "type": "object",
        "properties": {"product": STRING, "quantity": INTEGER},
        "required": ["product", "quantity"],
    }
    return [
        Field(draw.one("order_id", "id", "number"), INTEGER, number, f"This is order {number}."),
        Field(
            draw.one("customer", "name", "buyer"),
            STRING,
            customer,
            draw.one(f"The customer is {customer}.", f"{customer} placed an order."),
        ),
        Field("items", {"type": "array", "items": item_schema}, items, f"Ordered: {told}."),
        Field("paid", BOOLEAN, paid, f"The order is {'paid' if paid else 'not paid'}."),
        Field("status", {"type": "string", "enum": ["open", "shipped", "done"]}, status, f"The status is {status}."),
        Field(draw.one("city", "destination"), STRING, city, f"Send it to {city}."),
    ]


def ticket_fields(draw: Draw) -> list[Field]:
    """A support ticket."""
    who, part = draw.person(), draw.of(banks.OBJECTS)
    priority, number, solved = draw.one("low", "medium", "high"), draw.number(1, 9999), draw.chance(0.5)
    problem = draw.one("broken", "lost", "too slow", "too loud", "dirty", "late")
    return [
        Field(draw.one("ticket", "id"), INTEGER, number, f"Ticket {number}."),
        Field(
            draw.one("reporter", "user", "name"),
            STRING,
            who,
            draw.one(f"{who} reports a problem.", f"Reported by {who}."),
        ),
        Field(draw.one("device", "object", "item"), STRING, part, f"It is about the {part}."),
        Field(draw.one("problem", "issue"), STRING, problem, f"The {part} is {problem}."),
        Field(
            "priority",
            {"type": "string", "enum": ["low", "medium", "high"]},
            priority,
            draw.one(f"The priority is {priority}.", f"This has {priority} priority."),
        ),
        Field("solved", BOOLEAN, solved, f"The problem is {'solved' if solved else 'not solved'}."),
    ]


DOMAINS: tuple[Callable[[Draw], list[Field]], ...] = (
    person_fields,
    product_fields,
    event_fields,
    order_fields,
    ticket_fields,
)


def schema_of(fields: list[Field]) -> dict[str, object]:
    """The JSON schema of an object with these fields."""
    return {
        "type": "object",
        "properties": {field.key: field.schema for field in fields},
        "required": [field.key for field in fields],
    }


def type_name(schema: dict[str, object]) -> str:
    """A schema in words."""
    if "enum" in schema:
        options = schema["enum"]
        assert isinstance(options, list)
        return "one of " + ", ".join(options)
    if schema["type"] == "array":
        items = schema["items"]
        assert isinstance(items, dict)
        return "list of " + (
            "strings" if items["type"] == "string" else "objects with product (string) and quantity (integer)"
        )
    if schema["type"] == "object":
        return "object with street (string) and number (integer)"
    return str(schema["type"])


def example_of(field: Field) -> object:
    """A placeholder that shows the shape of a field."""
    if isinstance(field.value, bool):
        return False
    if isinstance(field.value, int | float):
        return 0
    return (
        "..."
        if isinstance(field.value, str)
        else ["..."]
        if field.schema.get("items") == STRING
        else field.schema["type"]
    )


def request(draw: Draw, fields: list[Field]) -> str:
    """Say which object is wanted."""
    kind = draw.number(0, 4)
    if kind <= 1:
        schema = json.dumps(schema_of(fields))
        return (
            draw.one(
                "Answer with JSON that follows this schema: ",
                "Extract JSON by this schema: ",
                "Reply with a JSON object that matches this JSON schema: ",
                "Use this schema: ",
                "Schema: ",
            )
            + schema
        )
    if kind == 2:
        listed = ", ".join(f"{field.key} ({type_name(field.schema)})" for field in fields)
        return (
            draw.one(
                "Extract as JSON with the keys ", "Answer in JSON with these keys: ", "Give me a JSON object with "
            )
            + listed
            + "."
        )
    if kind == 3:
        listed = ", ".join(field.key for field in fields)
        return (
            draw.one("Extract ", "Give me ", "Return ")
            + listed
            + draw.one(" as JSON.", " as a JSON object.", " in JSON.")
        )
    shape = json.dumps({field.key: example_of(field) for field in fields})
    return draw.one("Answer in this JSON format: ", "Fill in this JSON: ", "Use exactly this JSON format: ") + shape


def chosen_fields(draw: Draw, count: int) -> list[tuple[list[Field], str]]:
    """The same wanted fields of `count` objects of one domain, each with a text that states them and sometimes more."""
    domain = draw.rng.choice(DOMAINS)
    first = domain(draw)
    stated = [0, *draw.rng.sample(range(1, len(first)), min(len(first) - 1, draw.number(1, 5)))]
    wanted = [index for index in stated if draw.chance(0.8)] or [0]
    if draw.chance(0.3):
        draw.rng.shuffle(wanted)
    keys = [first[index].key for index in wanted]
    wanted = [index for position, index in enumerate(wanted) if first[index].key not in keys[:position]]
    objects = []
    for position in range(count):
        fields = first if position == 0 else domain(draw)
        named = [replace(fields[index], key=first[index].key) for index in wanted]
        objects.append((named, " ".join(fields[index].sentence for index in stated)))
    return objects


def extraction(draw: Draw) -> Exercise:
    """Extract one object, or in training several in a row after one request."""
    objects = chosen_fields(draw, 1 if draw.heldout else draw.rng.choices((1, 2, 3), (5, 3, 2))[0])
    pretty = draw.chance(0.15)
    style = (
        draw.one(" Indent the JSON by two spaces.", " Write pretty JSON.")
        if pretty
        else draw.one("", "", " Only JSON.", " Write compact JSON on one line.")
    )
    ask = request(draw, objects[0][0]) + style
    messages: list[Message] = []
    value: dict[str, Value] = {}
    in_system = draw.chance(0.4)
    if in_system:
        messages.append({"role": "system", "content": ask})
    for position, (fields, text) in enumerate(objects):
        if position == 0 and not in_system:
            text = f"{ask}\n{text}" if draw.chance(0.5) else f"{text}\n{ask}"
        value = {field.key: field.value for field in fields}
        messages += [user(text), assistant(json.dumps(value, indent=2 if pretty else None, ensure_ascii=False))]
    return Exercise("json", messages, is_json(value))


def array(draw: Draw) -> Exercise:
    """Turn a list into a JSON array."""
    items: list[str] | list[int] = (
        draw.distinct(banks.PLAIN_WORDS, draw.number(2, 6))
        if draw.chance(0.6)
        else [draw.number(0, 999) for _ in range(draw.number(2, 6))]
    )
    shown = ", ".join(map(str, items))
    return Exercise(
        "json",
        [
            user(
                draw.one(
                    f"Write as a JSON array: {shown}",
                    f"Convert this list to JSON: {shown}",
                    f"{shown}\nGive me this as a JSON list.",
                )
            ),
            assistant(json.dumps(items)),
        ],
        is_json(items),
    )


def conversion(draw: Draw) -> Exercise:
    """Turn a list into a JSON array, key-value lines into an object, or read one value of an object."""
    kind = draw.number(0, 3)
    if kind == 0:
        return array(draw)
    keys = draw.distinct(banks.OBJECTS + banks.FRUITS, draw.number(2, 6))
    value = {key: draw.rng.choice((draw.number(0, 999), draw.of(banks.COLOURS), draw.of(banks.CITIES))) for key in keys}
    if kind == 1:
        shown = (
            "\n".join(f"{key}: {value[key]}" for key in keys)
            if draw.chance(0.5)
            else ", ".join(f"{key} = {value[key]}" for key in keys)
        )
        return Exercise(
            "json",
            [
                user(draw.one("Convert to JSON:", "Write this as a JSON object:", "As JSON, please:") + f"\n{shown}"),
                assistant(json.dumps(value)),
            ],
            is_json(value),
        )
    key = draw.rng.choice(keys)
    shown = json.dumps(value)
    if kind == 2:
        found = str(value[key])
        return Exercise(
            "json",
            [
                user(
                    f"{shown}\n"
                    + draw.one(f"What is the value of {key}?", f"Which value has the key {key}?", f"What is {key}?")
                ),
                assistant(found),
            ],
            lambda text: text.strip() == found,
        )
    new = draw.number(0, 999)
    changed = {**value, key: new}
    return Exercise(
        "json",
        [user(f"{shown}\nSet {key} to {new} and write the JSON again."), assistant(json.dumps(changed))],
        is_json(changed),
    )
