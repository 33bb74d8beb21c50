"""Rules for running text by language: clean pages are kept and boilerplate is rejected, in eight languages."""

import pytest

from tasks.common.text.words import words
from tasks.validate import languages
from tasks.validate.languages import Language, find_language, rules_of
from tasks.validate.quality import SENTENCE_END_PATTERN, Quality, quality_rejection_reason

ALL_RATIOS = Quality(min_words_for_ratios=30)  # every rule applies to the short pages below
CLEAN = {
    "de": "Der Fluss entspringt in den Hügeln nördlich der Stadt und fließt durch ein breites Tal nach Süden. An "
    "seinen Ufern standen früher viele Mühlen, die das Korn der Bauern mahlten. Heute sind die meisten von ihnen "
    "verfallen, aber im Sommer kommen noch immer Familien mit ihren Kindern hierher. „Wir sind gern am Wasser“, sagt "
    "eine Frau, die nicht weit von der alten Brücke wohnt. Ob die Mühlen wieder aufgebaut werden, ist noch "
    "nicht entschieden.",
    "fr": "La rivière prend sa source dans les collines au nord de la ville et traverse une large vallée vers le sud. "
    "Sur ses rives se trouvaient autrefois de nombreux moulins, qui servaient à moudre le blé des paysans. La plupart "
    "sont aujourd'hui en ruine, mais les familles y viennent encore en été avec leurs enfants. « Nous aimons être près "
    "de l'eau », dit une femme qui habite non loin du vieux pont. Pourquoi ne pas les reconstruire ? Personne ne le "
    "sait.",
    "es": "El río nace en las colinas al norte de la ciudad y corre por un valle ancho hacia el sur. En sus orillas "
    "había antes muchos molinos, que molían el trigo de los campesinos. Hoy la mayoría está en ruinas, pero en verano "
    "las familias todavía vienen con sus hijos. «Nos gusta estar cerca del agua», dice una mujer que vive no lejos del "
    "puente viejo. ¿Por qué no se reconstruyen? Nadie lo sabe con certeza.",
    "ru": "Река берёт начало в холмах к северу от города и течёт по широкой долине на юг. На её берегах раньше стояло "
    "много мельниц, которые мололи зерно для крестьян. Сегодня большинство из них разрушено, но летом сюда всё ещё "
    "приезжают семьи с детьми. «Мы любим быть у воды», — говорит женщина, которая живёт недалеко от старого моста. "
    "Почему их не восстановили? Этого никто не знает.",
    "zh": "这条河发源于城市北部的山丘，流经宽阔的山谷，一直向南。过去，河岸上有许多磨坊，为农民磨麦子。如今，大多数磨坊"
    "已经倒塌，但是到了夏天，人们仍然带着孩子来这里。住在老桥附近的一位妇女说：“我们喜欢在水边。”为什么不重建它们呢？没有人知道答案。",
    "ja": "この川は町の北にある丘から流れ出て、広い谷を通って南へ向かう。昔は川岸に多くの水車小屋があり、農家の麦をひい"
    "ていた。今ではそのほとんどが壊れてしまったが、夏になると家族が子どもを連れてやって来る。「水のそばにいるのが好きです」と、"
    "古い橋の近くに住む女性は話した。なぜ建て直さないのだろうか。それは誰も知らない。",
    "ar": "ينبع النهر من التلال الواقعة شمال المدينة ويجري في واد واسع نحو الجنوب. كانت على ضفافه في الماضي طواحين "
    "كثيرة تطحن القمح للفلاحين، ولكن معظمها مهدم اليوم. وفي الصيف ما زالت العائلات تأتي إلى هذا المكان مع أطفالها. "
    "تقول امرأة تعيش على مقربة من الجسر القديم: «نحن نحب أن نكون قرب الماء». لماذا لم يتم بناء الطواحين من جديد؟ لا "
    "أحد يعرف الجواب عن ذلك.",
    "hi": "यह नदी शहर के उत्तर की पहाड़ियों से निकलती है और एक चौड़ी घाटी से होकर दक्षिण की ओर बहती है। पहले इसके किनारों पर बहुत सी "
    "चक्कियाँ थीं, जो किसानों का गेहूँ पीसती थीं। आज उनमें से ज़्यादातर टूट चुकी हैं, लेकिन गर्मियों में लोग अब भी अपने बच्चों के साथ यहाँ "
    "आते हैं। पुराने पुल के पास रहने वाली एक महिला ने कहा कि उन्हें पानी के पास रहना अच्छा लगता है। इन्हें फिर से क्यों नहीं बनाया गया? यह "
    "कोई नहीं जानता।",
}  # fmt: skip
MENUS = {
    "de": "Startseite Über uns Aktuelles Produkte Dienstleistungen Kontakt Impressum Datenschutz Anmelden Warenkorb",
    "fr": "Accueil À propos Actualités Produits Services Contact Mentions légales Confidentialité Connexion Panier",
    "es": "Inicio Quiénes somos Noticias Productos Servicios Contacto Aviso legal Privacidad Entrar Carrito",
    "ru": "Главная О компании Новости Товары Услуги Контакты Вакансии Конфиденциальность Войти Корзина",
    "zh": "首页 关于我们 新闻中心 产品展示 服务项目 联系我们 法律声明 隐私政策 登录 购物车",
    "ja": "ホーム 会社概要 お知らせ 製品一覧 サービス お問い合わせ 利用規約 プライバシー ログイン カート",
    "ar": "الرئيسية من نحن الأخبار المنتجات الخدمات اتصل بنا الوظائف الخصوصية الدخول السلة",
    "hi": "मुखपृष्ठ परिचय समाचार उत्पाद सेवाएँ संपर्क करियर गोपनीयता लॉगिन टोकरी",
}
LEAD_INS = {
    "de": "Bevor Sie die Mühle betreten, prüfen Sie bitte:",
    "fr": "Avant d'entrer dans le moulin, vérifiez les points suivants :",
    "es": "Antes de entrar en el molino hay que comprobar lo siguiente:",
    "ru": "Прежде чем войти в мельницу, проверьте следующее:",
    "zh": "进入磨坊之前，请先检查以下几点：",
    "ja": "水車小屋に入る前に、次の点を確かめてください：",
    "ar": "قبل الدخول إلى الطاحونة يجب التحقق من الأمور التالية:",
    "hi": "चक्की में प्रवेश करने से पहले इन बातों की जाँच करें:",
}
CODE = """
def read(path):
    with open(path) as file:
        for line in file:
            name, value = line.split("=")
            table[name.strip()] = int(value)
    return sorted(table.items(), key=lambda item: item[1])
for (let i = 0; i < rows.length; i++) { total += rows[i].price * rows[i].count; }
"""


def reason(text: str, language: str, bounds: Quality = ALL_RATIOS) -> str | None:
    """Return why a page is rejected if its language is the only one that is kept."""
    found, rejected = find_language(text, None, Language(keep=[language]))
    return rejected or quality_rejection_reason(text, words(text), bounds, rules_of(found or languages.UNDETERMINED))


def sentences(language: str) -> list[str]:
    return [part for part in SENTENCE_END_PATTERN.sub("\n", CLEAN[language]).split("\n") if part.strip()]


@pytest.mark.parametrize("language", CLEAN)
def test_clean_page_is_kept_in_its_language(language: str) -> None:
    assert len(words(CLEAN[language])) >= ALL_RATIOS.min_words_for_ratios
    assert reason(CLEAN[language], language) is None
    assert reason(CLEAN[language], language, Quality()) is None
    assert find_language(CLEAN[language], None, None)[0] == language


@pytest.mark.parametrize("language", CLEAN)
def test_clean_page_of_another_language_is_rejected(language: str) -> None:
    other = next(code for code in CLEAN if code != language)
    assert reason(CLEAN[language], other) == f"language: {language}, not {other}"


@pytest.mark.parametrize("language", CLEAN)
def test_single_sentences_of_a_clean_page_are_kept(language: str) -> None:
    ends = {"zh": "。", "ja": "。", "hi": "।"}
    for sentence in sentences(language):
        assert quality_rejection_reason(
            sentence + ends.get(language, "."), words(sentence), Quality(min_words=1), rules_of(language)
        ) is None  # fmt: skip


@pytest.mark.parametrize("language", CLEAN)
@pytest.mark.parametrize("separator", ["\n", " | ", "\n• "])
def test_menu_is_rejected(language: str, separator: str) -> None:
    assert reason(separator.join(MENUS[language].split()), language, Quality()) == "quality: no sentence end"


@pytest.mark.parametrize("language", CLEAN)
def test_paragraph_that_a_list_follows_is_kept(language: str) -> None:
    assert reason(LEAD_INS[language], language) is None
    assert reason(LEAD_INS[language].rstrip(":："), language) == "quality: no sentence end"


@pytest.mark.parametrize("language", CLEAN)
def test_labels_with_colons_are_rejected(language: str) -> None:
    labels = "\n".join(f"{word}:" for word in MENUS[language].split())
    assert reason(labels, language, Quality()) == "quality: no sentence end"


@pytest.mark.parametrize("language", CLEAN)
def test_list_of_links_is_rejected(language: str) -> None:
    links = "\n".join(
        f"{word} https://example.org/{number}.html" for number, word in enumerate(MENUS[language].split())
    )
    assert str(reason(links, language)).startswith(("quality", "language"))


@pytest.mark.parametrize("language", CLEAN)
def test_table_of_numbers_is_rejected(language: str) -> None:
    head = "\t".join(MENUS[language].split()[:4])
    rows = [f"{year}\t{year * 7 % 1000}.{year % 10}\t{year % 97} %\t{year * 13}" for year in range(1990, 2020)]
    assert str(reason("\n".join([head, *rows]), language)).startswith(("quality", "language"))


@pytest.mark.parametrize("language", CLEAN)
def test_code_is_rejected(language: str) -> None:
    assert str(reason(f"{MENUS[language]}\n{CODE}", language)).startswith(("quality", "language"))


@pytest.mark.parametrize("language", CLEAN)
def test_repeated_lines_are_rejected(language: str) -> None:
    sentence = CLEAN[language][:40] + {"zh": "。", "ja": "。", "hi": "।"}.get(language, ".")
    repeated = "\n".join([sentence] * 6)
    assert reason(repeated, language, Quality(min_stop_words=0)) == (
        "quality: more than 30% of the text repeats earlier lines"
    )


@pytest.mark.parametrize("language", CLEAN)
def test_list_of_search_terms_is_rejected(language: str) -> None:
    """Search terms are separated by commas, or are sentences without a function word."""
    terms = MENUS[language].split()
    comma = "، " if language == "ar" else "、" if language in ("zh", "ja") else ", "
    assert reason(comma.join(f"{a} {b}" for a in terms for b in terms), language) is not None
    nouns = [term for term in terms if len(words(term)) == 1 or language in ("zh", "ja")]
    stops = ". ".join(f"{a} {b}" for a in nouns for b in nouns) + "."
    if language not in ("zh", "ja"):
        assert reason(stops, language) is not None


def test_rules_of_a_language_without_its_own_fit_every_script() -> None:
    rules = rules_of("ka")
    assert (rules.stop_words, rules.mean_word_length, rules.punctuated) == (frozenset(), None, True)
    georgian = "მდინარე იწყება ქალაქის ჩრდილოეთით მდებარე გორაკებზე და მიედინება სამხრეთისკენ. იქ ბევრი წისქვილი იდგა."
    assert quality_rejection_reason(georgian, words(georgian), Quality(min_words_for_ratios=5), rules) is None
    assert rules_of(languages.UNDETERMINED) == rules


def test_languages_without_sentence_ends_need_none() -> None:
    thai = "แม่น้ำสายนี้มีต้นกำเนิดจากเนินเขาทางตอนเหนือของเมืองและไหลผ่านหุบเขากว้างไปทางใต้ ในอดีตมีโรงสีอยู่ริมฝั่งมากมาย"
    assert reason(thai, "th", Quality()) is None


@pytest.mark.parametrize(("code", "other"), [("zh", "yue"), ("ar", "arz"), ("no", "nn"), ("id", "ms")])
def test_languages_of_one_macrolanguage_share_rules(code: str, other: str) -> None:
    assert languages.is_same(code, other)
    assert rules_of(code) == rules_of(other)
    assert rules_of(code).stop_words


def test_stop_words_are_words_of_their_languages() -> None:
    """Each is one word as `words` splits texts, so that it can be found."""
    for language, listed in languages.STOP_WORDS.items():
        assert all(words(word) == [word] for word in listed.split()), language
        assert language in languages.LANGUAGES


def test_language_is_identified_within_the_document_and_not_by_its_beginning() -> None:
    licence = "Permission is granted to copy, distribute and modify this document under the terms of the licence. " * 3
    assert find_language(licence + CLEAN["de"] * 4, None, Language(keep=["de"])) == ("de", None)


def test_declared_language_is_believed() -> None:
    assert find_language(CLEAN["de"], "fr", Language(keep=["fr"])) == ("fr", None)
    assert find_language(CLEAN["de"], "de", Language(keep=["fr"])) == ("de", "language: de, not fr")
    assert find_language("Ja.", "de", None) == ("de", None)


def test_short_prose_counts_as_the_only_language_to_keep() -> None:
    assert find_language("Ja.", None, Language(keep=["de"])) == ("de", None)
    assert find_language("Ja.", None, Language(keep=["de", "nl"])) == (None, None)
    assert find_language("Ja.", None, None) == (None, None)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("One. Two! Three? “Four.” (Five.)", 5),
        ("„Das ist alles.“ Pourquoi ? 3.14 is pi; see a.b/c.html", 2),
        ("1. Home\n2. Contact\n 3. Help", 0),
        ("In 1990. Then", 1),
        ("今日は。明日は！本当？はい", 3),
        ("क्या? हाँ। ٹھیک۔ نعم؟", 4),
        ("x != y; f(a)!.b", 0),
    ],
)
def test_sentence_ends_of_scripts_are_counted(text: str, ends: int) -> None:
    assert len(SENTENCE_END_PATTERN.findall(text)) == ends


def test_word_length_of_the_settings_replaces_that_of_the_language() -> None:
    text = CLEAN["de"]
    short = Quality(min_words_for_ratios=30, max_mean_word_length=4.0)
    assert reason(text, "de", short) == "quality: the mean word length is not between 3 and 4 characters"


def test_unknown_declared_language_is_reported() -> None:
    from tasks.validate.curation import Curation

    with pytest.raises(ValueError, match=r"unknown language german; expected one of ace, af, "):
        Curation(languages={"handbook": "german"})
