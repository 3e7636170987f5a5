"""The tools of the tool-call exercises: their definitions, how users ask for them, and what they return."""

from collections.abc import Callable
from dataclasses import dataclass

from training.aspen import banks
from training.aspen.exercise import Draw

Arguments = dict[str, object]
Result = tuple[dict[str, object], str, str]
"""What a tool returns, the answer built from it, and the value the answer must mention."""


@dataclass(frozen=True, slots=True)
class Request:
    """One use of a tool: how a user asks, the arguments, and what comes back."""

    ask: str
    arguments: Arguments
    result: Result


@dataclass(frozen=True, slots=True, eq=False)
class Tool:
    """A function with interchangeable names; `parameters` maps a parameter to (its schema, its description)."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: dict[str, tuple[dict[str, object], str]]
    use: Callable[[Draw], Request]


STRING: dict[str, object] = {"type": "string"}
INTEGER: dict[str, object] = {"type": "integer"}
NUMBER: dict[str, object] = {"type": "number"}
BOOLEAN: dict[str, object] = {"type": "boolean"}


def options(*values: str) -> dict[str, object]:
    """The schema of a string with fixed values."""
    return {"type": "string", "enum": list(values)}


def weather(draw: Draw) -> Request:
    """Weather of a city."""
    city, sky, degrees = (
        draw.of(banks.CITIES),
        draw.one("sunny", "cloudy", "rainy", "windy", "snowy", "foggy"),
        draw.number(-10, 38),
    )
    ask = draw.one(
        f"What is the weather in {city}?",
        f"How is the weather in {city} today?",
        f"what's the weather like in {city}",
        f"Is it raining in {city}?",
        f"Tell me the weather in {city}.",
        f"weather {city}",
    )
    return Request(
        ask,
        {"city": city},
        (
            {"city": city, "temperature": degrees, "condition": sky},
            f"It is {sky} in {city} with {degrees} degrees.",
            str(degrees),
        ),
    )


def forecast(draw: Draw) -> Request:
    """Forecast for some days."""
    city, days, sky = draw.of(banks.CITIES), draw.number(2, 10), draw.one("sunny", "cloudy", "rainy", "windy", "snowy")
    ask = draw.one(
        f"Give me the forecast for {city} for {days} days.",
        f"What will the weather be in {city} in the next {days} days?",
        f"I need a {days} day forecast for {city}.",
    )
    return Request(ask, {"city": city, "days": days}, ({"forecast": sky}, f"The forecast for {city} is {sky}.", sky))


def clock(draw: Draw) -> Request:
    """Time in a city."""
    city, time = draw.of(banks.CITIES), f"{draw.number(0, 23):02d}:{draw.number(0, 59):02d}"
    ask = draw.one(f"What time is it in {city}?", f"Tell me the time in {city}.", f"what is the current time in {city}")
    return Request(ask, {"city": city}, ({"time": time}, f"It is {time} in {city}.", time))


def stock(draw: Draw) -> Request:
    """Price of a share."""
    company, price = draw.of(banks.COMPANIES), draw.number(100, 99999) / 100
    ask = draw.one(
        f"What is the stock price of {company}?",
        f"How much is a share of {company}?",
        f"Get the share price of {company}.",
    )
    return Request(
        ask, {"company": company}, ({"price": price}, f"A share of {company} costs {price} euros.", str(price))
    )


def convert(draw: Draw) -> Request:
    """Exchange of money."""
    first, second = draw.rng.sample(("EUR", "USD", "GBP", "JPY", "CHF", "INR"), 2)
    amount, result = draw.number(1, 5000), draw.number(1, 9000)
    ask = draw.one(
        f"Convert {amount} {first} to {second}.",
        f"How much is {amount} {first} in {second}?",
        f"What are {amount} {first} in {second}?",
    )
    return Request(
        ask,
        {"amount": amount, "from": first, "to": second},
        ({"result": result}, f"{amount} {first} are {result} {second}.", str(result)),
    )


def calculate(draw: Draw) -> Request:
    """A sum for the calculator."""
    a, b, operator = draw.number(2, 9999), draw.number(2, 9999), draw.one("+", "-", "*", "/")
    expression, result = f"{a} {operator} {b}", draw.number(1, 99999)
    ask = draw.one(
        f"Calculate {expression} with the calculator.",
        f"What is {expression}?",
        f"Compute {expression}.",
        f"Use the tool to work out {expression}.",
    )
    return Request(ask, {"expression": expression}, ({"result": result}, f"{expression} = {result}", str(result)))


def email(draw: Draw) -> Request:
    """A message to somebody."""
    name, subject = (
        draw.of(banks.FIRST_NAMES),
        draw.one("Meeting", "Invoice", "Holiday", "Report", "Question", "Lunch", "Party", "Project"),
    )
    body = draw.one(
        f"See you on {draw.of(banks.DAYS)}.",
        f"The {draw.of(banks.OBJECTS)} is ready.",
        "Thank you for your help.",
        f"I will be in {draw.of(banks.CITIES)}.",
        f"Please bring the {draw.of(banks.OBJECTS)}.",
    )
    ask = draw.one(
        f'Send an email to {name} with the subject "{subject}" and the text "{body}"',
        f'Write to {name}, subject "{subject}": "{body}"',
    )
    return Request(
        ask,
        {"to": name, "subject": subject, "body": body},
        ({"status": "sent"}, f"The email to {name} was sent.", "sent"),
    )


def reminder(draw: Draw) -> Request:
    """A reminder at a time."""
    what = draw.one(
        f"buy {draw.of(banks.FOODS)}",
        f"call {draw.of(banks.FIRST_NAMES)}",
        f"clean the {draw.of(banks.OBJECTS)}",
        f"feed the {draw.of(banks.ANIMALS)}",
    )
    time = f"{draw.number(6, 23):02d}:{draw.one('00', '15', '30', '45')}"
    ask = draw.one(
        f"Remind me to {what} at {time}.", f"Set a reminder for {time}: {what}", f"At {time}, remind me to {what}."
    )
    return Request(
        ask, {"text": what, "time": time}, ({"status": "ok"}, f"I will remind you to {what} at {time}.", time)
    )


def alarm(draw: Draw) -> Request:
    """A timer in minutes."""
    minutes = draw.number(1, 120)
    ask = draw.one(
        f"Set a timer for {minutes} minutes.", f"Start a {minutes} minute timer.", f"timer {minutes} minutes"
    )
    return Request(
        ask, {"minutes": minutes}, ({"status": "started"}, f"The timer is set for {minutes} minutes.", str(minutes))
    )


def light(draw: Draw) -> Request:
    """Switch lights."""
    room, on = (
        draw.one("kitchen", "garage", "garden", "attic", "office", "bedroom", "cellar", "hall", "library"),
        draw.chance(0.5),
    )
    word = "on" if on else "off"
    ask = draw.one(
        f"Turn {word} the light in the {room}.", f"Switch the {room} light {word}.", f"{room} light {word} please"
    )
    return Request(ask, {"room": room, "on": on}, ({"status": "ok"}, f"The light in the {room} is {word}.", word))


def thermostat(draw: Draw) -> Request:
    """Set a temperature."""
    room, degrees = draw.one("kitchen", "office", "bedroom", "cellar", "hall", "library"), draw.number(14, 26)
    ask = draw.one(
        f"Set the {room} to {degrees} degrees.",
        f"Heat the {room} to {degrees} degrees.",
        f"Make it {degrees} degrees in the {room}.",
    )
    return Request(
        ask,
        {"room": room, "temperature": degrees},
        ({"status": "ok"}, f"The {room} is set to {degrees} degrees.", str(degrees)),
    )


def translate(draw: Draw) -> Request:
    """A word in another language."""
    word, language = (
        draw.of(banks.OBJECTS + banks.ANIMALS),
        draw.one("German", "French", "Spanish", "Italian", "Polish"),
    )
    result = draw.of(banks.PLAIN_WORDS)
    ask = draw.one(
        f'Translate "{word}" to {language}.',
        f"How do you say {word} in {language}?",
        f"What is the {language} word for {word}?",
    )
    return Request(
        ask,
        {"text": word, "language": language},
        ({"translation": result}, f'"{word}" is "{result}" in {language}.', result),
    )


def book_table(draw: Draw) -> Request:
    """A table in a restaurant."""
    place, people, day = draw.of(banks.PLAIN_WORDS).capitalize(), draw.number(1, 12), draw.of(banks.DAYS)
    ask = draw.one(
        f"Book a table for {people} at {place} on {day}.", f"Reserve a table at {place} for {people} people on {day}."
    )
    return Request(
        ask,
        {"restaurant": place, "people": people, "day": day},
        ({"status": "booked"}, f"A table for {people} at {place} on {day} is booked.", place),
    )


def flights(draw: Draw) -> Request:
    """Flights between two cities."""
    (start, end), day, price = draw.distinct(banks.CITIES, 2), draw.of(banks.DAYS), draw.number(30, 900)
    ask = draw.one(
        f"Find a flight from {start} to {end} on {day}.",
        f"I want to fly from {start} to {end} on {day}.",
        f"Are there flights from {start} to {end} on {day}?",
    )
    return Request(
        ask,
        {"from": start, "to": end, "day": day},
        ({"price": price}, f"There is a flight from {start} to {end} for {price} euros.", str(price)),
    )


def play(draw: Draw) -> Request:
    """Music."""
    artist, volume = draw.person(), draw.number(1, 100)
    ask = draw.one(f"Play music by {artist} at volume {volume}.", f"I want to hear {artist} at volume {volume}.")
    return Request(
        ask, {"artist": artist, "volume": volume}, ({"status": "playing"}, f"Now playing music by {artist}.", artist)
    )


def search(draw: Draw) -> Request:
    """A search in documents."""
    topic, found = (
        draw.one(
            f"{draw.of(banks.ADJECTIVES)} {draw.of(banks.OBJECTS)}",
            f"{draw.of(banks.FOODS)} recipes",
            f"hotels in {draw.of(banks.CITIES)}",
            f"{draw.of(banks.ANIMALS)} pictures",
        ),
        draw.number(1, 999),
    )
    ask = draw.one(f"Search for {topic}.", f"Look up {topic}.", f"Find {topic}.")
    return Request(ask, {"query": topic}, ({"results": found}, f"I found {found} results for {topic}.", str(found)))


def contact(draw: Draw) -> Request:
    """The telephone number of a person."""
    name, phone = draw.person(), str(draw.number(100000, 999999))
    ask = draw.one(
        f"What is the phone number of {name}?",
        f"Find the phone number of {name}.",
        f"I want to call {name}. What is the number?",
    )
    return Request(ask, {"name": name}, ({"phone": phone}, f"The phone number of {name} is {phone}.", phone))


def order_status(draw: Draw) -> Request:
    """Where an order is."""
    number, status = draw.number(100, 99999), draw.one("open", "shipped", "delivered", "cancelled")
    ask = draw.one(f"Where is my order {number}?", f"What is the status of order {number}?", f"Check order {number}.")
    return Request(ask, {"order_id": number}, ({"status": status}, f"Order {number} is {status}.", status))


def create_task(draw: Draw) -> Request:
    """A task with a priority."""
    title, priority = (
        draw.one(
            f"repair the {draw.of(banks.OBJECTS)}",
            f"visit {draw.of(banks.CITIES)}",
            f"write to {draw.of(banks.FIRST_NAMES)}",
        ),
        draw.one("low", "medium", "high"),
    )
    ask = draw.one(f"Create a task with {priority} priority: {title}", f"Add a {priority} priority task: {title}")
    return Request(
        ask,
        {"title": title, "priority": priority},
        ({"status": "created"}, f"The task was created with {priority} priority.", priority),
    )


def dice(draw: Draw) -> Request:
    """Dice."""
    count, total = draw.number(1, 6), draw.number(1, 36)
    ask = draw.one(f"Roll {count} dice.", f"Throw {count} dice for me.", f"roll {count} dice")
    return Request(ask, {"count": count}, ({"total": total}, f"The total is {total}.", str(total)))


TOOLS: tuple[Tool, ...] = (
    Tool(
        ("get_weather", "weather", "current_weather", "fetch_weather", "weather_lookup"),
        ("Get the current weather of a city.", "Current weather."),
        {"city": (STRING, "Name of the city")},
        weather,
    ),
    Tool(
        ("get_forecast", "forecast", "weather_forecast"),
        ("Get the weather forecast of a city.", "Forecast for some days."),
        {"city": (STRING, "Name of the city"), "days": (INTEGER, "Number of days")},
        forecast,
    ),
    Tool(
        ("get_time", "current_time", "time_in_city"),
        ("Get the current time in a city.", "Current time."),
        {"city": (STRING, "Name of the city")},
        clock,
    ),
    Tool(
        ("get_stock_price", "stock_price", "share_price"),
        ("Get the price of a share.", "Stock price of a company."),
        {"company": (STRING, "Name of the company")},
        stock,
    ),
    Tool(
        ("convert_currency", "exchange", "convert_money"),
        ("Convert money to another currency.",),
        {"amount": (NUMBER, "Amount"), "from": (STRING, "Currency code"), "to": (STRING, "Currency code")},
        convert,
    ),
    Tool(
        ("calculator", "calculate", "evaluate"),
        ("Evaluate an arithmetic expression.", "Do a calculation."),
        {"expression": (STRING, "The expression")},
        calculate,
    ),
    Tool(
        ("send_email", "send_mail", "write_email"),
        ("Send an email.",),
        {"to": (STRING, "Who gets it"), "subject": (STRING, "Subject"), "body": (STRING, "Text")},
        email,
    ),
    Tool(
        ("set_reminder", "create_reminder", "add_reminder"),
        ("Set a reminder.", "Remind the user of something."),
        {"text": (STRING, "What to do"), "time": (STRING, "Time as HH:MM")},
        reminder,
    ),
    Tool(
        ("set_timer", "start_timer", "timer"), ("Start a timer.",), {"minutes": (INTEGER, "Duration in minutes")}, alarm
    ),
    Tool(
        ("switch_light", "set_light", "light"),
        ("Turn a light on or off.",),
        {"room": (STRING, "The room"), "on": (BOOLEAN, "true for on")},
        light,
    ),
    Tool(
        ("set_temperature", "thermostat", "heat"),
        ("Set the temperature of a room.",),
        {"room": (STRING, "The room"), "temperature": (INTEGER, "Degrees")},
        thermostat,
    ),
    Tool(
        ("translate", "translate_text", "translation"),
        ("Translate a text.",),
        {"text": (STRING, "The text"), "language": (STRING, "Target language")},
        translate,
    ),
    Tool(
        ("book_table", "reserve_table"),
        ("Book a table in a restaurant.",),
        {"restaurant": (STRING, "Name"), "people": (INTEGER, "Number of people"), "day": (STRING, "Day of the week")},
        book_table,
    ),
    Tool(
        ("find_flight", "search_flights", "flights"),
        ("Find flights between two cities.",),
        {"from": (STRING, "Start"), "to": (STRING, "Destination"), "day": (STRING, "Day")},
        flights,
    ),
    Tool(
        ("play_music", "play", "play_artist"),
        ("Play music.",),
        {"artist": (STRING, "Name of the artist"), "volume": (INTEGER, "Volume from 1 to 100")},
        play,
    ),
    Tool(
        ("search", "web_search", "find"),
        ("Search the web.", "Search for something."),
        {"query": (STRING, "What to search for")},
        search,
    ),
    Tool(
        ("find_contact", "get_phone_number", "phone_book"),
        ("Find the phone number of a person.",),
        {"name": (STRING, "Name of the person")},
        contact,
    ),
    Tool(
        ("order_status", "get_order", "track_order"),
        ("Get the status of an order.",),
        {"order_id": (INTEGER, "Number of the order")},
        order_status,
    ),
    Tool(
        ("create_task", "add_task", "new_task"),
        ("Create a task.",),
        {"title": (STRING, "What to do"), "priority": (options("low", "medium", "high"), "Priority")},
        create_task,
    ),
    Tool(("roll_dice", "dice", "throw_dice"), ("Roll dice.",), {"count": (INTEGER, "Number of dice")}, dice),
)
