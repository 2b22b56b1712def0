"""Where text ends: at a stop string, and while streaming before what a later token may still change."""

from spark.inference.decoder import Stream
from spark.inference.load import load
from spark.inference.text import continue_prompts, cut, without_open_end


def test_activity_is_of_steps_of_decoding(run):
    """Not of the prompts, whose chunks of tokens read other records: n tokens take n − 1 steps."""
    served = load(run[0], serve={'kernels': 'gather'})
    one, two, three = (continue_prompts(served, ['spark ' * 20], n, chunk=16) for n in (1, 2, 3))
    assert one['new_tokens'] == 1 and one['gb_per_step'] == 0 and 'active' not in one
    assert two['records_read'] == three['records_read'] == 12 and two['gb_per_step'] > 0


def test_where_eos_comes_at_once_the_step_after_it_is_told(run, monkeypatch):
    served = load(run[0], serve={'kernels': 'gather'})
    decode = Stream.decode  # … with every token an end of the text
    monkeypatch.setattr(Stream, 'decode', lambda self, key, sampling, stop=(): decode(self, key, sampling, stop and range(264)))
    none = continue_prompts(served, ['spark ' * 20], 4, chunk=16)
    assert none['new_tokens'] == 0 and none['records_read'] == 12


def test_the_first_stop_string_cuts():
    assert cut('one two three', ['three', 'two']) == ('one ', True)
    assert cut('one two', ['three', '']) == ('one two', False)


def test_what_a_later_token_may_change_waits():
    assert without_open_end('one tw', ['two']) == 'one '
    assert without_open_end('one t', ['two', 't w']) == 'one '
    assert without_open_end('one two', ['two']) == 'one two'  # for `cut`
    assert without_open_end('漢\ufffd', ()) == '漢'
