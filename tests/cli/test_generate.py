from mxperts.cli import app

ARGUMENTS = ["--max-new-tokens", "12", "--prompt", "Now is"]


def test_prompt_and_continuation_go_to_stdout(runner, checkpoint):
    result = runner.invoke(app, ["generate", str(checkpoint), *ARGUMENTS, "--greedy"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("N o w")  # characters are tokens, and tokens are joined with blanks
    assert "12 tokens in" in result.stderr


def test_the_same_seed_gives_the_same_text(runner, checkpoint):
    texts = [
        runner.invoke(app, ["generate", str(checkpoint), *ARGUMENTS, "--seed", seed]).stdout for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_temperature_zero_is_greedy(runner, checkpoint):
    greedy = runner.invoke(app, ["generate", str(checkpoint), *ARGUMENTS, "--greedy"])
    cold = runner.invoke(app, ["generate", str(checkpoint), *ARGUMENTS, "--temperature", "0", "--seed", "5"])
    assert greedy.stdout == cold.stdout


def test_the_prompt_can_be_piped_in(runner, checkpoint):
    piped = runner.invoke(app, ["generate", str(checkpoint), *ARGUMENTS[:2], "--greedy"], input="Now is\n")
    given = runner.invoke(app, ["generate", str(checkpoint), *ARGUMENTS, "--greedy"])
    assert piped.stdout == given.stdout


def test_on_the_fly_quantisation_changes_the_text(runner, checkpoint):
    texts = {
        runner.invoke(app, ["generate", str(checkpoint), *ARGUMENTS, "--greedy", *extra]).stdout
        for extra in ([], ["--scheme", "w_mxfp4_a_mxfp4"])
    }
    assert len(texts) == 2


def test_an_empty_prompt_is_refused(runner, checkpoint):
    result = runner.invoke(app, ["generate", str(checkpoint), "--prompt", ""])
    assert result.exit_code == 1
    assert "prompt is empty" in result.stderr


def test_more_than_the_context_is_refused(runner, checkpoint):
    result = runner.invoke(app, ["generate", str(checkpoint), "--prompt", "Now", "--max-new-tokens", "62"])
    assert result.exit_code == 1
    assert "3 tokens and 62 new ones exceed the model's 64" in result.stderr
