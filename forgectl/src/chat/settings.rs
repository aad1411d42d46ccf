//! How a chat's answers are sampled: what the user set, else the model's own defaults, else ours.

use std::str::FromStr;

use forge_shared::generate::SamplingParams;
use forge_shared::link::DefaultSampling;

use crate::cli::SamplingFlags;

/// Ours, for models that recommend nothing: lively, without the unlikeliest tokens.
const TEMPERATURE: f32 = 0.7;
const TOP_P: f32 = 0.95;

/// Names that can be set.
const NAMES: &str = "temperature, top_p, top_k, min_p, repetition_penalty, max_tokens, seed, system";

/// Changes one setting; `default` takes it back.
///
/// # Errors
/// An unknown name, or a value it cannot take, in words. Nothing is changed then.
pub fn set(settings: &mut SamplingFlags, name: &str, value: &str) -> Result<(), String> {
    let mut changed = settings.clone();
    match name.replace('-', "_").as_str() {
        "temperature" => changed.temperature = parse(name, value)?,
        "top_p" => changed.top_p = parse(name, value)?,
        "top_k" => changed.top_k = parse(name, value)?,
        "min_p" => changed.min_p = parse(name, value)?,
        "repetition_penalty" => changed.repetition_penalty = parse(name, value)?,
        "max_tokens" => changed.max_tokens = parse(name, value)?,
        "seed" => changed.seed = parse(name, value)?,
        "system" => changed.system = (value != "default").then(|| value.to_owned()),
        _ => return Err(format!("there is no setting {name:?}; there are {NAMES}")),
    }
    check(&changed)?;
    *settings = changed;
    Ok(())
}

fn parse<T: FromStr>(name: &str, value: &str) -> Result<Option<T>, String> {
    if value == "default" {
        return Ok(None);
    }
    value.parse().map(Some).map_err(|_| format!("{name} takes a number, not {value:?}"))
}

/// Checks every range.
///
/// # Errors
/// The first setting out of range, with what it may be.
pub fn check(settings: &SamplingFlags) -> Result<(), String> {
    params(settings, &DefaultSampling::default(), u32::MAX).check().map_err(|error| error.to_string())
}

/// Parameters of a request with room for `room` tokens.
pub fn params(settings: &SamplingFlags, model: &DefaultSampling, room: u32) -> SamplingParams {
    let defaults = SamplingParams::default();
    SamplingParams {
        temperature: settings.temperature.or(model.temperature).unwrap_or(TEMPERATURE),
        top_p: settings.top_p.or(model.top_p).unwrap_or(TOP_P),
        top_k: settings.top_k.or(model.top_k).unwrap_or(defaults.top_k),
        min_p: settings.min_p.or(model.min_p).unwrap_or(defaults.min_p),
        repetition_penalty: settings.repetition_penalty.or(model.repetition_penalty).unwrap_or(defaults.repetition_penalty),
        max_tokens: settings.max_tokens.unwrap_or(room).min(room),
        ..defaults
    }
}

/// All settings for `/show`, with the ones in force where none was set.
pub fn rows(settings: &SamplingFlags, model: &DefaultSampling) -> Vec<(&'static str, String)> {
    let params = params(settings, model, u32::MAX);
    vec![
        ("temperature", params.temperature.to_string()),
        ("top_p", params.top_p.to_string()),
        ("top_k", params.top_k.to_string()),
        ("min_p", params.min_p.to_string()),
        ("repetition_penalty", params.repetition_penalty.to_string()),
        ("max_tokens", settings.max_tokens.map_or("what the context leaves".into(), |count| count.to_string())),
        ("seed", settings.seed.map_or("random".into(), |seed| seed.to_string())),
        ("system", settings.system.clone().unwrap_or("none".into())),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_wins_over_the_model_and_the_model_over_us() {
        let mut settings = SamplingFlags::default();
        let model = DefaultSampling { temperature: Some(0.5), ..Default::default() };
        assert_eq!(params(&settings, &model, 9).temperature, 0.5);
        assert_eq!(params(&settings, &model, 9).top_p, TOP_P);
        assert_eq!(params(&settings, &model, 9).max_tokens, 9);
        set(&mut settings, "temperature", "0").expect("in range");
        set(&mut settings, "max-tokens", "4").expect("in range");
        assert_eq!(params(&settings, &model, 9).temperature, 0.0);
        assert_eq!(params(&settings, &model, 9).max_tokens, 4);
        assert_eq!(params(&settings, &model, 3).max_tokens, 3);
        set(&mut settings, "temperature", "default").expect("goes back");
        assert_eq!(params(&settings, &model, 9).temperature, 0.5);
    }

    #[test]
    fn wrong_values_change_nothing() {
        let mut settings = SamplingFlags::default();
        for (name, value, expected) in [
            ("temperature", "hot", "takes a number"),
            ("temperature", "3", "between 0 and 2"),
            ("temperature", "NaN", "between 0 and 2"),
            ("top_p", "0", "top_p must be between"),
            ("top_k", "-1", "takes a number"),
            ("max_tokens", "0", "at least 1"),
            ("colour", "red", "no setting \"colour\""),
        ] {
            let message = set(&mut settings, name, value).expect_err(name);
            assert!(message.contains(expected), "{message}");
            assert_eq!(rows(&settings, &DefaultSampling::default()), rows(&SamplingFlags::default(), &DefaultSampling::default()));
        }
    }
}
