"""English words that name lines, keys and needles in the questions."""

from random import Random

ADJECTIVES: tuple[str, ...] = tuple(
    """
    able acid aged airy amber ample angry apt arid avid awake azure bad bald basic beige big
    bitter black bland blank bleak blond blue blunt bold brave brief bright brisk broad brown
    calm careful cheap chief clean clear clever cloudy coarse cold cool coral cosmic cozy crazy
    crisp cruel curly cute damp dark dear deep dense dim dirty dizzy double dry dull dusty eager
    early easy elastic elegant empty equal exact extra faint fair false famous fancy fast fat
    fierce final fine firm fit flaky flat fluffy fond formal foul frail frank free fresh frozen
    full funny fuzzy gentle giant glad glossy gold good grand gray great green grim gross gruff
    handy happy hard harsh hasty heavy hollow honest hot huge humble hungry icy ideal idle ivory
    jolly juicy keen kind large late lazy lean light lively local lone long loud loyal lucky
    lush mad major mellow mild minor misty modern moist narrow neat new nice noble noisy novel
    odd old orange pale perfect pink plain plump polite poor proud pure purple quick quiet rapid
    rare raw ready red rich rigid ripe rough round royal rude rusty sad safe salty sandy scarce
    sharp shiny short shy silent silly silver simple sleek slim slow small smart smooth sober
    soft solid sour spare spicy stale steep stern stiff still strict strong sturdy subtle sudden
    sunny super sweet swift tall tame tart tender tense thick thin tidy tight tiny torpid tough
    tropic true ugly upset urban usual vague vain vast vivid warm wary weak weary wet white
    whole wicked
    """.split()
)

NOUNS: tuple[str, ...] = tuple(
    """
    acorn actor agent album alley anchor angle ankle apple apron arch arrow artist atlas attic
    aunt autumn badge baker ball banana band bank barn basket bat bay beach bean bear beard bed
    bee bell belt bench berry bike bird biscuit blade boat bone book boot bottle bowl box boy
    brain branch bread brick bridge broom brush bucket bug bull bus butter cabin cable cactus
    cage cake camel camera camp canal candle candy canoe cap cape car card cargo carpet carrot
    cart castle cat cattle cave cello chain chair chalk cheek cheese cherry chess chest chin
    church city clam clock cloud clown coach coal coast coat cobweb coin collar comet cook
    copper cord corn couch cousin cow crab crane crate crayon creek crib crow crown cup curtain
    daisy dance deer desk diary dinner dirt ditch dock doctor dog doll donkey door dove dragon
    drawer dress drum duck eagle ear earth egg elbow elf engine eye fairy farm father feather
    fence field finger fire fish flag flame flock floor flower flute fly fog foot forest fork
    fox frame friend frog fruit galaxy garden gate gem ghost giraffe girl glove goat goose grape
    grass guitar hammer hand harbor hat hawk heart hill honey hood hook horn horse hose hotel
    house ice insect iron island jacket jail jam jar jeans jelly jewel judge kettle key kid king
    kite kitten knee knife knot lace lake lamp land lawyer leaf leg lemon lion lizard lock lunch
    magnet maid map marble mask meadow meal milk mirror mitten monkey moon moose mouse mouth
    music
    """.split()
)

VERBS: tuple[str, ...] = tuple(
    """
    asked bought brought called carried chased counted covered drew dropped fed followed found
    gave held helped hid kept left liked lost made met missed moved painted passed pulled pushed
    reached saw sold sought taught thanked took touched turned washed watched
    """.split()
)


def sentence(rng: Random) -> str:
    r"""Makes one random sentence, a whole line.

    Args:
        rng: Source of randomness.

    Returns:
        A line such as ``"The able acorn found the warm harbor.\\n"``.
    """
    subject, thing = rng.choices(NOUNS, k=2)
    first, second = rng.choices(ADJECTIVES, k=2)
    return f"The {first} {subject} {rng.choice(VERBS)} the {second} {thing}.\n"
