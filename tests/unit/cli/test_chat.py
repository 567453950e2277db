"""What chat sends."""

from tidegate.cli.chat import History, Options, queue_words
from tidegate.v1 import inference_pb2 as pb


def test_the_whole_conversation_goes_with_each_question():
    history = History()
    history.add("one?", "one.")
    request = history.request(Options(address="", system="be brief", max_tokens=9, temperature=0.0, seed=4), "two?")
    assert [(message.role, message.content) for message in request.chat.messages] == [
        ("system", "be brief"),
        ("user", "one?"),
        ("assistant", "one."),
        ("user", "two?"),
    ]
    assert (request.max_tokens, request.sampling.temperature, request.sampling.seed) == (9, 0.0, 4)


def test_what_was_not_said_on_the_command_line_is_left_to_the_mesh():
    request = History().request(Options(address=""), "hello")
    assert not request.HasField("max_tokens")
    assert not request.sampling.HasField("temperature")
    assert not request.sampling.HasField("seed")
    assert request.model == ""


def test_a_place_in_the_queue_is_told_in_words():
    queued = pb.Queued(position=3)
    assert queue_words(queued) == "queued, position 3"
    queued.expected_wait.FromMilliseconds(3_200)
    assert queue_words(queued) == "queued, position 3, about 4 s"
