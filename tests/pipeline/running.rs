//! param-run on a model trained a moment ago: what is printed, where it ends, what makes it repeatable.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

use crate::command::{output_of, outputs_of, param_run};
use crate::fixture::{Trained, write};

fn run(trained: &Trained, flags: &[&str]) -> Command {
    let mut command = param_run();
    command.arg("-m").arg(trained.gguf()).args(flags);
    command
}

#[test]
fn greedy_text_is_the_same_on_any_number_of_threads_and_as_tokens() {
    let trained = Trained::new(60, &[], None);
    let greedy = |flags: &[&str]| {
        output_of(run(&trained, &["-p", "the river", "-n", "22", "--temp", "0", "--ignore-eos"]).args(flags))
    };
    let text = greedy(&["-t", "1"]);
    assert_eq!(text, greedy(&["-t", "2"]));
    assert_eq!(text, greedy(&["-t", "3"]));
    let ids = greedy(&["--print-tokens"]);
    let ids = ids.trim_end().split(',').map(|id| id.parse::<u32>().unwrap()).collect::<Vec<_>>();
    assert_eq!(ids.len(), 22);
    let model = param_runtime::Model::open(trained.gguf()).unwrap();
    assert_eq!(model.tokenizer().unwrap().decode(&ids), text.strip_suffix('\n').unwrap());
}

#[test]
fn prompts_come_from_the_command_line_a_file_or_as_tokens_alike() {
    let trained = Trained::new(20, &[], None);
    let prompt = "the old café\n";
    let file = write(trained.path(), "prompt.txt", prompt);
    let greedy = ["-n", "10", "--temp", "0"];
    let from_flag = output_of(run(&trained, &greedy).args(["-p", prompt]));
    assert_eq!(output_of(run(&trained, &greedy).arg("-f").arg(file)), from_flag);
    let model = param_runtime::Model::open(trained.gguf()).unwrap();
    let ids = model.encode(prompt).unwrap().iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    assert_eq!(output_of(run(&trained, &greedy).args(["--tokens", &ids])), from_flag);
}

/// Words that any page of Shakespeare is full of.
const FREQUENT: &str = "the and i to of my a you that in is not with be for it his your this have shall will thou me as he but so what our her him \
    thy are we no do by on";

#[test]
fn the_model_that_comes_with_the_project_writes_english() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/shakespeare.gguf");
    let text = output_of(param_run().args(["-m", model, "-p", "ROMEO:", "-n", "110", "--temp", "0.8", "--seed", "1"]));
    let words = text.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty()).collect::<Vec<_>>();
    let is_frequent = |word: &&&str| FREQUENT.split_whitespace().any(|frequent| word.eq_ignore_ascii_case(frequent));
    // Characters drawn by their frequency alone make none but `a` and `I`.
    let n_frequent = words.iter().filter(is_frequent).count();
    assert!(
        words.len() > 15 && 4 * n_frequent >= words.len(),
        "{n_frequent} of {} words are frequent: {text}",
        words.len()
    );
}

#[test]
fn stop_strings_end_the_text_and_are_not_printed() {
    let trained = Trained::new(60, &[], None);
    let greedy = ["-p", "the ", "-n", "24", "--temp", "0"];
    let text = output_of(&mut run(&trained, &greedy));
    let text = text.strip_suffix('\n').unwrap();
    let characters = text.chars().collect::<Vec<_>>();
    let stop = characters[6..9].iter().collect::<String>();
    let before = &text[..text.find(&stop).unwrap()];
    let stopped = output_of(run(&trained, &greedy).args(["--stop", "not in it", "--stop", &stop]));
    assert_eq!(stopped.strip_suffix('\n').unwrap(), before);
}

#[test]
fn seeds_reproduce_and_the_closing_line_tells_the_one_drawn() {
    let trained = Trained::new(5, &[], None);
    let sampled = |flags: &[&str]| outputs_of(run(&trained, &["-p", "the ", "-n", "24", "--temp", "1.5"]).args(flags));
    let (first, log) = sampled(&[]);
    let seed = log.trim_end().rsplit_once("seed ").unwrap().1.to_owned();
    assert_eq!(sampled(&["--seed", &seed]).0, first);
    assert_eq!(sampled(&["--seed", &seed, "-t", "1"]).0, first, "on one thread");
    assert_ne!(sampled(&["--seed", "1"]).0, sampled(&["--seed", "2"]).0);
}

#[test]
fn a_full_context_ends_with_a_message_or_overflows_as_asked() {
    let trained = Trained::new(20, &[], None);
    let greedy = |flags: &[&str]| {
        let (ids, log) = outputs_of(
            run(&trained, &["-p", "the river ", "--temp", "0", "--ignore-eos", "--print-tokens"]).args(flags),
        );
        (ids.trim_end().split(',').map(str::to_owned).collect::<Vec<_>>(), log)
    };
    let (stopped, log) = greedy(&[]);
    assert_eq!(stopped.len(), 32 - "the river ".len());
    assert!(log.contains("the context of 32 tokens is full: --overflow slide"), "{log}");
    for overflow in ["slide", "window"] {
        let (ids, log) = greedy(&["--overflow", overflow, "-n", "100"]);
        assert_eq!(ids.len(), 100, "{overflow}");
        assert_eq!(ids[..stopped.len()], stopped, "{overflow}");
        assert!(!log.contains("is full"), "{log}");
    }
    let (ids, log) = greedy(&["-c", "16"]);
    assert_eq!((ids.len(), log.contains("the context of 16 tokens is full")), (6, true));
}

#[test]
fn long_prompts_run_where_the_context_may_overflow() {
    let trained = Trained::new(20, &[], None);
    let prompt = "the river and the old bridge under the stone ".repeat(3);
    for overflow in ["slide", "window"] {
        let flags = ["-p", &prompt, "--overflow", overflow, "-n", "5", "--temp=0", "--print-tokens", "--ignore-eos"];
        assert_eq!(output_of(&mut run(&trained, &flags)).split(',').count(), 5, "{overflow}");
    }
}

/// Byte tokens of an untrained BPE make broken characters likely, so that nothing but care keeps the stream whole.
#[test]
fn what_is_streamed_is_whole_characters_at_every_moment() {
    let trained = Trained::new(1, &[], None);
    let run_folder = trained.path().join("bpe");
    let mut train = crate::command::param_train();
    train.arg("--data").arg(trained.data()).arg("--out").arg(&run_folder).args(crate::fixture::tiny());
    output_of(train.args(["--vocab-size=257", "--steps=1"]));
    output_of(crate::command::param_convert().arg(&run_folder).arg(trained.gguf()));
    let mut child = run(&trained, &["-p", "日本", "-n", "400", "--temp", "3", "--seed", "5", "--overflow=slide"])
        .args(["--ignore-eos", "--top-k=0", "--top-p=1", "--min-p=0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let n = stdout.read(&mut buffer).unwrap();
        if n == 0 {
            break;
        }
        text.extend_from_slice(&buffer[..n]);
        assert!(std::str::from_utf8(&text).is_ok(), "after {} bytes", text.len());
    }
    assert!(child.wait().unwrap().success());
    assert!(String::from_utf8(text).unwrap().contains('\u{FFFD}'), "no broken character to be careful about");
}

#[test]
fn conversation_answers_line_after_line_until_its_input_ends() {
    let trained = Trained::new(20, &[], None);
    let mut child = run(&trained, &["-i", "-n", "3", "--temp", "0", "--ignore-eos"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
    for line in ["the\n", "old\n"] {
        stdin.write_all(line.as_bytes()).unwrap();
        let mut answer = String::new();
        stdout.read_line(&mut answer).unwrap();
        assert!(!answer.is_empty());
    }
    drop(stdin);
    assert!(child.wait().unwrap().success());
}

#[test]
fn an_empty_prompt_begins_a_text() {
    let trained = Trained::new(20, &[], None);
    let flags = ["-p", "", "-n", "5", "--temp", "0", "--ignore-eos", "--print-tokens"];
    assert_eq!(output_of(&mut run(&trained, &flags)).split(',').count(), 5);
}

#[test]
fn nothing_but_generated_text_goes_to_standard_output() {
    let trained = Trained::new(5, &[], None);
    let (out, log) = outputs_of(&mut run(&trained, &["-p", "the", "-n", "0"]));
    assert!(out.trim().is_empty(), "{out}");
    assert!(log.contains("prefill 3 tokens"), "{log}");
}
