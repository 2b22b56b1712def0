"""Where text ends: at a stop string, and while streaming before what a later token may still change."""

from spark.inference.text import cut, without_open_end


def test_the_first_stop_string_cuts():
    assert cut('one two three', ['three', 'two']) == ('one ', True)
    assert cut('one two', ['three', '']) == ('one two', False)


def test_what_a_later_token_may_change_waits():
    assert without_open_end('one tw', ['two']) == 'one '
    assert without_open_end('one t', ['two', 't w']) == 'one '
    assert without_open_end('one two', ['two']) == 'one two'  # for `cut`
    assert without_open_end('漢\ufffd', ()) == '漢'
