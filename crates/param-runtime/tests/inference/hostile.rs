//! Files that are not the model they claim to be, and requests that make no sense: an error that names the culprit, each time.

use gguf::{GgmlType, Gguf, Metadata};
use param_model::Tokenizer;
use param_runtime::{Error, Model, Rows, Session, SessionOptions};

use crate::tiny::{Tiny, config, model, tokens};

fn f32_model() -> Tiny {
    Tiny::new(config(), GgmlType::F32, None)
}

fn refusal(tiny: &Tiny) -> String {
    tiny.open().unwrap_err().to_string()
}

#[test]
fn every_missing_tensor_is_named() {
    for i in 0..f32_model().tensors.len() {
        let mut tiny = f32_model();
        let (name, ..) = tiny.tensors.remove(i);
        assert!(refusal(&tiny).contains(&format!("`{name}`")), "{name}");
    }
}

#[test]
fn a_wrong_shape_is_told_with_both_shapes() {
    let mut tiny = f32_model();
    tiny.tensors.iter_mut().find(|t| t.0 == "blk.0.ffn_up_exps.weight").unwrap().1 = vec![5, 64, 256];
    assert_eq!(refusal(&tiny), "tensor `blk.0.ffn_up_exps.weight`: expected [5, 256, 64], got [5, 64, 256]");
    let mut tiny = f32_model();
    tiny.tensors.iter_mut().find(|t| t.0 == "position_embd.weight").unwrap().1 = vec![96 * 64];
    assert_eq!(refusal(&tiny), "tensor `position_embd.weight`: expected [96, 64], got [6144]");
}

#[test]
fn a_tensor_too_many_is_named() {
    let mut tiny = f32_model();
    tiny.tensors.push(("blk.0.attn_q.bias".into(), vec![64], vec![0.0; 64], GgmlType::F32));
    assert!(refusal(&tiny).contains("`blk.0.attn_q.bias` has no place"));
}

#[test]
fn a_type_that_cannot_be_multiplied_is_named() {
    let mut tiny = f32_model();
    tiny.tensors.iter_mut().find(|t| t.0 == "blk.1.attn_k.weight").unwrap().3 = GgmlType::I32;
    let message = refusal(&tiny);
    assert!(message.contains("`blk.1.attn_k.weight` (I32)"), "{message}");
}

#[test]
fn another_architecture_is_refused() {
    let mut tiny = f32_model();
    tiny.metadata = Metadata::new();
    tiny.metadata.insert("general.architecture", "llama").unwrap();
    assert!(refusal(&tiny).contains("llama"));
    tiny.metadata = Metadata::new();
    assert!(refusal(&tiny).contains("general.architecture"));
}

#[test]
fn metadata_that_disagrees_with_the_tensors_is_refused() {
    let mut tiny = f32_model();
    tiny.metadata = Tiny::new(param_model::Config { n_layer: 4, ..config() }, GgmlType::F32, None).metadata;
    assert!(refusal(&tiny).contains("`blk.3."));
    tiny.metadata = Tiny::new(param_model::Config { n_vocab: 61, ..config() }, GgmlType::F32, None).metadata;
    assert_eq!(refusal(&tiny), "tensor `token_embd.weight`: expected [61, 64], got [60, 64]");
}

#[test]
fn a_tokenizer_larger_than_the_vocabulary_is_refused() {
    let tokenizer = Tokenizer::train_bpe(["some text ".repeat(30)].into_iter(), 260).unwrap();
    let message = refusal(&Tiny::new(config(), GgmlType::F32, Some(&tokenizer)));
    assert!(message.contains("only 60"), "{message}");
}

#[test]
fn cutting_the_file_anywhere_gives_an_error_and_no_panic() {
    let bytes = f32_model().bytes();
    for len in (0..bytes.len()).step_by(997) {
        assert!(Gguf::from_bytes(bytes[..len].to_vec()).map_err(Error::from).and_then(Model::from_gguf).is_err());
    }
}

#[test]
fn weights_that_are_no_numbers_are_an_error_that_names_the_place() {
    for name in [
        "blk.1.ffn_up.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.2.attn_norm.bias",
        "token_embd.weight",
        "blk.0.attn_v.weight",
    ] {
        let mut tiny = f32_model();
        tiny.values(name).fill(f32::NAN);
        let mut session = Session::new(&tiny.open().unwrap(), &SessionOptions::default()).unwrap();
        session.push(&tokens(20)).unwrap();
        let error = session.forward(Rows::Last).unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }), "{name}: {error}");
    }
}

#[test]
fn requests_out_of_range_are_refused_and_change_nothing() {
    let model = model(GgmlType::F32);
    for n_ctx in [0, 97, usize::MAX] {
        let options = SessionOptions { n_ctx: Some(n_ctx), ..SessionOptions::default() };
        assert!(matches!(Session::new(&model, &options), Err(Error::ContextLength { n_ctx: 96, .. })));
    }
    let mut session = Session::new(&model, &SessionOptions::default()).unwrap();
    assert!(matches!(session.forward(Rows::Last), Err(Error::EmptyContext)));
    assert!(session.forward(Rows::All).unwrap().is_empty());
    assert!(matches!(session.push(&[1, 60]), Err(Error::Token { token: 60, n_vocab: 60 })));
    assert!(matches!(session.push(&tokens(97)), Err(Error::ContextFull { n_past: 0, n_new: 97, n_ctx: 96 })));
    assert!(session.tokens().is_empty());
    assert!(matches!(model.encode("text"), Err(Error::NoTokenizer)));
}
