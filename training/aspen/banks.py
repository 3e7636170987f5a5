"""Word lists from which the synthetic exercises are built."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> dict[str, str]:
    entries = (entry.split(": ") for entry in " ".join(text.split()).split("; "))
    return {key: value for key, value in entries}


FIRST_NAMES = _words(
    """
    Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paul Quinn Rosa Sam Tina
    Umar Vera Walter Xenia Yara Zoe Adam Bella Carlos Diana Erik Fatima George Hanna Ivan Julia Kevin Laura Marco
    Nora Omar Petra Rahul Sofia Tom Ursula Victor Wendy Yusuf Anna Ben Clara Daniel Eva Felix Gina Hugo Ida Jonas
    Kim Lena Max Noah Olga Peter Rita Simon Tara Uma Viktor Will Amir Bianca Chen Dora Elias Freya Gustav Helen
    Igor Jana Kofi Lucy Mei Nadia Otto Priya Ravi Sara Theo Vanessa Wanda Aiko Boris Celine Dmitri Elena Farid
    Greta Hassan Ingrid Jamal Kira Liam Mona Nils Olivia Pablo Rania Stefan Tariq Yuki
    """
)
LAST_NAMES = _words(
    """
    Smith Miller Brown Novak Garcia Rossi Weber Fischer Tanaka Silva Kumar Chen Olsen Dubois Ivanov Haddad
    Kowalski Larsen Murphy Nguyen Okafor Patel Quist Romero Schmidt Torres Ueda Varga Walker Young Ziegler Adams
    Baker Clark Davis Evans Foster Green Harris Jensen King Lopez Moore Nelson Parker Reed Stone Turner Wood Berg
    Costa Diaz Ferrari Hansen Keller Lang Meyer Roth Sato Vogel
    """
)
CITIES = _words(
    """
    Paris London Berlin Madrid Rome Vienna Oslo Lisbon Athens Dublin Prague Warsaw Helsinki Copenhagen Stockholm
    Brussels Zurich Geneva Munich Hamburg Boston Chicago Denver Seattle Austin Toronto Montreal Tokyo Osaka Kyoto
    Seoul Delhi Mumbai Cairo Nairobi Lagos Accra Lima Bogota Quito Santiago Sydney Perth Auckland Milan Naples
    Turin Porto Seville Lyon Nice Krakow Riga Tallinn Vilnius Bergen Graz Basel Ghent Utrecht
    """
)
COLOURS = _words(
    """
    red blue green yellow orange purple pink brown black white grey silver golden violet turquoise beige
    """
)
ANIMALS = _words(
    """
    cat dog horse cow sheep goat pig rabbit mouse fox wolf bear lion tiger elephant giraffe monkey eagle owl duck
    goose hen frog snake turtle whale dolphin shark bee ant spider parrot camel donkey deer hedgehog
    """
)
FRUITS = _words(
    """
    apple banana orange pear grape cherry lemon mango peach plum melon kiwi fig lime papaya apricot
    """
)
OBJECTS = _words(
    """
    lamp chair table book pen pencil cup plate spoon bottle bag box hat coat scarf shirt shoe key phone laptop
    camera clock mirror candle pillow blanket basket hammer drill ladder rope bucket brush kettle toaster fan
    radio guitar violin drum piano ball kite bicycle helmet tent backpack umbrella wallet watch ring notebook
    ruler map globe vase carpet curtain desk shelf sofa stool
    """
)
FOODS = _words(
    """
    bread cheese butter milk rice pasta soup salad honey jam coffee tea juice sugar salt flour eggs tomatoes
    potatoes onions carrots beans chocolate cake pizza
    """
)
JOBS = _words(
    """
    teacher doctor baker nurse pilot farmer lawyer painter writer singer driver cook engineer programmer gardener
    carpenter plumber dentist librarian architect photographer journalist scientist mechanic tailor
    """
)
HOBBIES = _words(
    """
    chess painting swimming running cooking reading gardening hiking cycling dancing fishing skiing sailing
    knitting photography singing climbing yoga tennis football
    """
)
MONTHS = _words(
    """
    January February March April May June July August September October November December
    """
)
DAYS = _words(
    """
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
    """
)
COMPANIES = _words(
    """
    Northwind Bluestone Greenleaf Solaris Quickstep Silverline Redwood Brightside Stonebridge Oakfield Riverview
    Sunrise Starling Clearwater Ironworks Highland Lakeside Meadow Pinecrest Westgate Novatech Datafield Cloudnine
    Papermill Windmill
    """
)
ADJECTIVES = _words(
    """
    old new small large heavy light fast slow cheap quiet bright dark soft warm cold clean sharp round tall short
    strong simple rare modern famous
    """
)
PLAIN_WORDS = _words(
    """
    river stone cloud forest window garden bridge market street island mountain valley ocean desert flower morning
    evening summer winter spring autumn paper metal glass wood silver copper iron sugar pepper butter thunder
    shadow mirror candle rocket planet signal engine turbine harbor castle village library museum theatre station
    airport ticket letter pocket button ribbon feather blanket lantern compass anchor barrel magnet crystal marble
    velvet cotton ginger walnut pumpkin cabbage lettuce tomato raven falcon salmon beetle panther badger otter
    heron magpie sparrow willow maple cedar birch alpha bravo delta echo hotel india kilo lima nova omega sigma
    tango victor zulu amber coral ivory jade onyx opal pearl ruby topaz
    """
)
CAPITALS = _pairs(
    """
    France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; Portugal: Lisbon; Austria: Vienna; Greece: Athens;
    Ireland: Dublin; Poland: Warsaw; Norway: Oslo; Sweden: Stockholm; Finland: Helsinki; Denmark: Copenhagen;
    Belgium: Brussels; Hungary: Budapest; Russia: Moscow; China: Beijing; Japan: Tokyo; India: New Delhi; Egypt:
    Cairo; Kenya: Nairobi; Canada: Ottawa; Mexico: Mexico City; Brazil: Brasilia; Argentina: Buenos Aires; Chile:
    Santiago; Peru: Lima; Cuba: Havana; Turkey: Ankara; Ukraine: Kyiv; Australia: Canberra; England: London; the
    United Kingdom: London; the United States: Washington, D.C.; the Netherlands: Amsterdam; Switzerland: Bern;
    South Korea: Seoul; Thailand: Bangkok; Vietnam: Hanoi; Iceland: Reykjavik; Morocco: Rabat; Colombia: Bogota;
    New Zealand: Wellington
    """
)
OPPOSITES = _pairs(
    """
    hot: cold; big: small; large: small; tall: short; long: short; fast: slow; old: young; new: old; good: bad;
    happy: sad; light: dark; day: night; up: down; left: right; open: closed; full: empty; hard: soft; rich: poor;
    strong: weak; high: low; early: late; wet: dry; clean: dirty; easy: difficult; first: last; near: far; loud:
    quiet; thick: thin; true: false; begin: end; start: stop; in: out; yes: no; black: white; win: lose; buy:
    sell; push: pull; cheap: expensive; heavy: light; north: south; east: west; summer: winter; love: hate
    """
)
IRREGULAR_PLURALS = _pairs(
    """
    mouse: mice; child: children; man: men; woman: women; foot: feet; tooth: teeth; goose: geese; person: people;
    leaf: leaves; knife: knives; wolf: wolves; sheep: sheep; fish: fish; box: boxes; city: cities; baby: babies;
    bus: buses; story: stories; half: halves; potato: potatoes
    """
)
SOUNDS = _pairs(
    """
    cat: meow; dog: woof; cow: moo; sheep: baa; duck: quack; pig: oink; hen: cluck; lion: roar; bee: buzz; snake:
    hiss; frog: croak; owl: hoot; horse: neigh
    """
)
NUMBER_WORDS = _words(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty
    """
)
