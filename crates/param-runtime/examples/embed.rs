//! The runtime inside an application: `cargo run --release --example embed -- model.gguf "Once upon a time"`.

use std::io::Write;

use param_runtime::{GenerateOptions, Model, Overflow, Session, SessionOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(prompt)) = (args.next(), args.next()) else {
        return Err("usage: embed MODEL.gguf PROMPT".into());
    };
    let model = Model::open(path)?;
    let mut session = Session::new(&model, &SessionOptions::default())?;
    session.prompt(&model.encode(&prompt)?, Overflow::Stop)?;
    let options = GenerateOptions { n_predict: Some(100), ..GenerateOptions::default() };
    for piece in session.generate(&options)? {
        print!("{}", piece?.text);
        std::io::stdout().flush()?;
    }
    println!();
    Ok(())
}
