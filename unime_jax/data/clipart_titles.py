"""Reads titles off Open Clip Art's file names, such as "apple_with_worm_dan_gerh_01".

Names are cut at 24 letters, and nothing separates the title from the contributor's name, so the
title ends at the first word that is a contributor's name or no English word. Some contributors
titled in Italian or French; their commonest words are translated.
"""

import re
from collections.abc import Set

from unime_jax.data import text_keys, wordnet

# Contributors whose names would pass for words.
_AUTHORS = frozenset(
    """
    aj ali alex alexander andrea andreas andrew andy anita anonymous anthony anton arc archi
    archit archite architetto ashton astrid aubanel b ben benj benji bogdan bram brice brill
    carlos charles chaspo chris christian christoph christophe clemente costea cumulus dan daniel
    danny darek dave davek david dennis didier dino dirk don donna dona durex enrique eric erich
    erik ernesto erwan felipe fernando filip fra francesco frank fred frouke gabriel gabrielle
    ganson geoff george gerald geral gerard gino giuseppe goneri greg guillaume hans hardi harry
    henry horst igor indana ingo jaime jakob james jamin jan jarno jason jasper jean jeff jeremy
    jerry jim joe joel john jon jonadab jonathan jonathon jordan jorge jose josef juan juliane jure
    jurgen k karl kenneth kevin kilian kurt larry laura leif leigh leo liam liekens linda lorenzo
    louis lucas luis lumen mads marcelo marco marcos mario mark martin massimiliano massimo mat
    mathias matt matthew matthias mauro max meda michael michel mike mikhail mimooh mirko mo
    molumen nae nathan nick nicolas nicu nik noah norbert nurbldoff olaf oliver olivier omar
    orlando oscar papapishu park patricia patrick paul pedro pete peter peterm petr petri phil
    philip philippe pierre r ralf ray reinhard rene ricardo richard rick rob robert roberto rodrigo
    roger rollandin roman romus ron rory roy ruud ryan sagar sam samuel santiago sebastian sek
    sergio seth shandy simon snifty stan stefan stephen steve steven steffen stuart susan sven
    tanguy taz ted terry theresa thom thomas tim timothy tobias tom tomas tony uliphant utrescu
    valessio vladimir w walter william willem wojciech yves zoltan
    """.split()
)
_UNSAID = frozenset("sexy stripper pantyhose cannabis nude gnome gnu van come".split())
# Words about the drawing, not the thing.
_NOISE = frozenset(
    "aiga art bw clip clipart color colour contour design form body part icon md outline "
    "png r s simple sketch svg symbol v".split()
)
_FUNCTION_WORDS = frozenset(
    "a an and at by for from in of on or out over the to under up with".split()
)
_FOREIGN = dict(
    pair.split("=")
    for pair in """
    abeille=bee abitazione=house acquila=eagle aglio=garlic albero=tree ambulans=ambulance
    ambulanza=ambulance anatra=duck anelli=rings antilope=antelope aquila=eagle arbre=tree
    baloon1=balloon barattolo=jar betoniera=cement-mixer biberon=baby-bottle bicicletta=bicycle
    binocolo=binoculars borsa=bag borsetta=handbag bottiglia=bottle bussola=compass cacuts=cactus
    calamita=magnet calcolatrice=calculator calzettoni=socks cammello=camel campeggio=camping
    candela=candle canguro=kangaroo carpentiere=carpenter casa=house casco=helmet
    cavalletta=grasshopper cavallo=horse cestino=basket cesto=basket champignon=mushroom chiave=key
    cigni=swans cigno=swan cinepresa=movie-camera ciuccio=pacifier clessidra=hourglass
    coccinella=ladybug
    coccinelle=ladybug coccinellona=ladybug coniglio=rabbit corridore=runner couronne=crown
    cronometro=stopwatch dente=tooth dino=dinosaur dinosauri=dinosaurs dinosauro=dinosaur
    donna=woman elefante=elephant elefante01=elephant elefante02=elephant elefantone=elephant
    engrenagem=gear extincteur=fire-extinguisher fabbrica=factory farfalla=butterfly
    farfalle=butterflies fata=fairy fattoria=farm ferro=iron finestra=window fiocco=bow
    fiore=flower fiori=flowers flamand=flamingo foglie=leaves formichina=ant formicona=ant
    fuoco=fire gabbiano=seagull gallo=rooster gateau=cake gattina=cat gatto=cat gelato=ice-cream
    gift01=gift gift02=gift gift03=gift gift04=gift gift05=gift glace=ice-cream
    grattacieli=skyscrapers gufo=owl imbianchino=house-painter insetto=insect lampada=lamp
    lattine=cans lente=lens leone=lion lettera=letter libellula=dragonfly libellule=dragonfly
    libro=book lucchetto=padlock lucertola=lizard lucertolona=lizard lucertolone=lizard lumaca=snail
    macchina=machine mante=mantis mantide=mantis martellare=hammering mattone=brick mazzo=bunch
    medicina=medicine microscopio=microscope mondo=world moschito=mosquito motosega=chainsaw
    mucca=cow mucche=cows nuage=cloud olifant=elephant ombrelloni=umbrellas orologio=clock
    orso=bear ours=bear pacco=package paesaggio=landscape palloncini=balloons pallone=balloon
    palmtree=palm-tree pansement=bandage papera=duck pasteque=watermelon pecora=sheep
    pecorella=sheep pennello=brush peperoncino=chili-pepper pera=pear pesca=peach pescetto=fish
    piggybank=piggy-bank pinguino=penguin pinkhome=house pollo=chicken poltrona=armchair
    pomodori=tomatoes portafoglio=wallet principessa=princess proiettore=projector
    provetta=test-tube provette=test-tubes prugna=plum quattro=four ragazza=girl ragazzo=boy
    ragnetto=spider ragno=spider ramarro=lizard rana=frog rana01=frog rana02=frog rana03=frog
    ravanello=radish redcar=red-car rinoceronte=rhinoceros rosa1=rose rosa2=rose ruota=wheel
    sacco=sack sapone=soap scatolone=box schermo=screen secchio=bucket sedia=chair sega=saw
    serratura=lock siringa=syringe spugna=sponge stambecco=ibex stampante=printer
    stetoscopio=stethoscope struzzo=ostrich tacchino=turkey tavolo=table tavolozza=palette
    tazza=cup teddybear=teddy-bear teiera=teapot telecamera=camera telefono=telephone
    televisore=television tenda=tent teschio=skull tigre=tiger tigre01=tiger tigre02=tiger
    tigre03=tiger tigre04=tiger tigre05=tiger tophat=top-hat topo=mouse toro=bull torta=cake
    tramezzino=sandwich trattore=tractor uccello=bird uccelli=birds uovo=egg utensile=tool
    utensili=tools vacca=cow valigie=suitcases vestito=dress zaino=backpack
    zanzara=mosquito zucca=pumpkin bianco=white bianchi=white bianca=white rossa=red rosse=red
    rosa=pink verde=green verdi=green nero=black neri=black grigia=gray grigio=gray grigi=gray
    marroni=brown arancioni=orange bionda=blonde caffe=coffee e=and di=of
    """.split()
)


class Titles:
    """Knows which words make a title.

    Args:
      words: WordNet.
    """

    def __init__(self, words: wordnet.WordNet):
        things = [
            synset
            for synset in words.synsets.values()
            if synset.name[0] == "n" and synset.lexfile in wordnet.VISIBLE
        ]
        self._nouns: Set[str] = {lemma.lower() for synset in things for lemma in synset.lemmas}
        # "magnifying" and "christmas" are words by "magnifying glass" and "Christmas tree";
        # people's names are left out.
        self._words: Set[str] = words.vocabulary() | {
            part.lower()
            for synset in things
            if synset.lexfile != wordnet.PERSON
            for lemma in synset.lemmas
            if " " in lemma
            for part in lemma.split()
        }

    def read(self, stem: str) -> str | None:
        """Reads the title; None if no word of it names something one can see."""
        title = []
        for word in re.findall(r"[a-z.]+\d*|\d+", stem.lower().replace("-", "_")):
            bare = re.sub(r"[\d.]+$", "", word)
            foreign = _FOREIGN.get(word) or _FOREIGN.get(bare)
            if foreign:
                title += [part for part in foreign.split("-") if part not in title]
                continue
            if bare in _AUTHORS:
                break
            if not bare or bare in _NOISE:
                continue
            if bare not in _FUNCTION_WORDS and not self._is_word(bare):
                break
            if title[-1:] != [bare]:  # "gatto_cat"
                title.append(bare)
        while title and title[-1] in _FUNCTION_WORDS:
            title.pop()
        if _UNSAID & set(title) or not any(map(self._names_something, title)):
            return None
        return " ".join(title)

    def _is_word(self, word: str) -> bool:
        return len(word) > 2 and (word in self._words or text_keys.singular(word) in self._words)

    def _names_something(self, word: str) -> bool:
        return word in self._nouns or text_keys.singular(word) in self._nouns
