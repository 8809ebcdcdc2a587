"""The parts of LongBench: prompts, lengths of answers and metrics.

Bai et al. 2024, "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding" (arXiv
2308.14508, github.com/THUDM/LongBench). Lengths, metrics, the order of instructions, context,
question and cue, and which parts go without a chat template are the published ones; the wording of
the instructions is ours, unless the data folder brings the official dataset2prompt.json.
"""

from __future__ import annotations

from commvq_core.evaluation.tasks.benchmark import Part

# The metric of each part, by the name of its function (see longbench.METRICS).
METRIC_OF = {
    "narrativeqa": "f1",
    "qasper": "f1",
    "multifieldqa_en": "f1",
    "multifieldqa_zh": "f1_chinese",
    "hotpotqa": "f1",
    "2wikimqa": "f1",
    "musique": "f1",
    "dureader": "rouge_chinese",
    "gov_report": "rouge",
    "qmsum": "rouge",
    "multi_news": "rouge",
    "vcsum": "rouge_chinese",
    "trec": "classification",
    "triviaqa": "f1",
    "samsum": "rouge",
    "lsht": "classification",
    "passage_count": "numbers",
    "passage_retrieval_en": "numbers",
    "passage_retrieval_zh": "numbers",
    "lcc": "code",
    "repobench-p": "code",
}

_NEW_TOKENS = {
    **dict.fromkeys(("narrativeqa", "qasper", "dureader", "samsum"), 128),
    **dict.fromkeys(("multifieldqa_en", "multifieldqa_zh", "trec", "lsht"), 64),
    **dict.fromkeys(("lcc", "repobench-p"), 64),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa"), 32),
    **dict.fromkeys(("passage_count", "passage_retrieval_en", "passage_retrieval_zh"), 32),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "vcsum"), 512),
}
_FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
_WITHOUT_CHAT = (*_FIRST_LINE, "lcc", "repobench-p")

ALL = tuple(METRIC_OF)
# LongBench-E: the parts that also come with even numbers of short, middling and long contexts.
EVEN = tuple(
    f"{name}_e"
    for name in (
        *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec"),
        *("triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
    )
)
# What Table 2 of the CommVQ paper averages over.
PAPER8 = (*("qasper", "qmsum", "multi_news", "trec", "triviaqa", "samsum", "lcc", "repobench-p"),)
CHINESE = tuple(name for name, metric in METRIC_OF.items() if metric.endswith("_chinese"))

PARTS = {
    name: Part(
        _NEW_TOKENS[name.removesuffix("_e")],
        chat=name.removesuffix("_e") not in _WITHOUT_CHAT,
        first_line=name.removesuffix("_e") in _FIRST_LINE,
    )
    for name in (*ALL, *EVEN)
}

_SHORT = "Reply with the answer alone and add no other words."
_PASSAGES = (
    f"Use the passages below to answer a question. {_SHORT}\n\n"
    "These are the passages.\n{context}\n\n"
    f"Use the passages above to answer the question. {_SHORT}\n\nQuestion: {{input}}\nAnswer:"
)
_BRIEF = "Be as brief as you can, a single phrase if that will do, and explain nothing."
_QASPER = (
    "Be as brief as you can, a single phrase or sentence if that will do. Where the article does "
    'not hold the answer, write "unanswerable". To a question of yes or no, write "yes", "no" or '
    '"unanswerable". Explain nothing.'
)

TEMPLATES = {
    "narrativeqa": (
        "Below is a story, a novel or the script of a film, and a question about it. "
        f"{_BRIEF}\n\nStory: {{context}}\n\nNow answer the question from the story. {_BRIEF}\n\n"
        "Question: {input}\n\nAnswer:"
    ),
    "qasper": (
        f"Below is a scientific article and a question about it. {_QASPER}\n\n"
        f"Article: {{context}}\n\nNow answer the question from the article above. {_QASPER}\n\n"
        "Question: {input}\n\nAnswer:"
    ),
    "multifieldqa_en": (
        "Read the text below and answer in a few words.\n\n{context}\n\n"
        f"Now answer this question from the text above. {_SHORT}\n\nQuestion: {{input}}\nAnswer:"
    ),
    "multifieldqa_zh": (
        "请阅读下面的文章，并用中文简要作答。\n\n{context}\n\n"
        "请根据上文回答问题，只写答案，不写别的内容。\n\n问题：{input}\n回答："
    ),
    "hotpotqa": _PASSAGES,
    "2wikimqa": _PASSAGES,
    "musique": _PASSAGES,
    "dureader": (
        "请根据所给文章回答问题。\n\n文章：{context}\n\n请根据上面的文章作答。\n\n"
        "问题：{input}\n回答："
    ),
    "gov_report": (
        "Below is a report of a government agency. Summarize it in one page.\n\n"
        "Report:\n{context}\n\nNow summarize the report in one page.\n\nSummary:"
    ),
    "qmsum": (
        "Below is the transcript of a meeting, and a query: a question or an instruction. Answer "
        "it in one sentence or several.\n\nTranscript:\n{context}\n\n"
        "Now answer the query from the transcript above in one sentence or several.\n\n"
        "Query: {input}\nAnswer:"
    ),
    "multi_news": (
        "Below are several articles from the news. Summarize all of them in one page.\n\n"
        "News:\n{context}\n\nNow summarize all of the news in one page.\n\nSummary:"
    ),
    "vcsum": (
        "以下是一份会议记录，请在阅读后总结会议的内容。\n会议记录：\n{context}\n\n会议总结："
    ),
    "trec": "Say of what type the question is. Some examples follow.\n\n{context}\n{input}",
    "triviaqa": (
        f"Answer the question from the passage. {_SHORT} Some examples follow.\n\n"
        "{context}\n\n{input}"
    ),
    "samsum": (
        "Summarize the dialogue in a few short sentences. Some examples follow.\n\n"
        "{context}\n\n{input}"
    ),
    "lsht": "请判断新闻属于哪个类别，以下是一些例子。\n\n{context}\n{input}",
    "passage_count": (
        "Below are paragraphs from Wikipedia, some of which may be there more than once. Read them "
        "with care and count the different ones: how many are left once repetitions are gone?"
        "\n\n{context}\n\nGive the number of different paragraphs. Write the number and nothing "
        "else, such as 1, 2 or 3.\n\nThe final answer is: "
    ),
    "passage_retrieval_en": (
        "Below are 30 paragraphs from Wikipedia and a summary of one of them. Find the paragraph "
        "that was summarized.\n\n{context}\n\nThis is the summary.\n\n{input}\n\n"
        'Give the number of its paragraph, written like "Paragraph 1" or "Paragraph 2".\n\n'
        "The answer is: "
    ),
    "passage_retrieval_zh": (
        "下面是若干段落，以及其中某一段的摘要。请找出摘要对应的段落。\n\n{context}\n\n"
        "以下是摘要：\n\n{input}\n\n请写出对应段落的编号，格式为“段落1”、“段落2”。\n\n答案是："
    ),
    "lcc": "Complete the code below.\n{context}Next line of code:\n",
    "repobench-p": "Complete the code below.\n{context}{input}Next line of code:\n",
}
