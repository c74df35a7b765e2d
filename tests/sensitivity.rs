//! `sparse24 sensitivity` as its users run it, on a small BERT of random weights and the CPU device.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/binary.rs"]
mod binary;
#[path = "common/tiny_bert.rs"]
mod tiny_bert;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use binary::{Run, command, json};
use serde_json::Value;
use sparse24::graph::Checkpoint;
use sparse24::text::{Files, Pipeline, Tokenizer, twin};
use sparse24::{DType, Sparse24, VectorLen, models, prune};
use tempfile::TempDir;
use tiny_bert::TinyBert;

const PAIRS: &str = "the cat sat,the dog sat,4\nthe cat ran on the mat.,dog,0.5\nthe mat,the cats,2\n\
                     dog on dog,the cat on the cat,3\ncat,the cat sat on the mat.,1\nran ran,sat,2.5\n\
                     the dog ran,a dogs ran .,3.5\non,. . .,0\n";
const TEXTS: &str = "the cat sat on the mat.\nthe dog ran\ncats\nmat on mat\nthe dogs sat\n";

/// A folder with a model, pairs and texts, and the outputs of a run.
struct Place {
    dir: TempDir,
    model: PathBuf,
}

impl Place {
    /// The model's folder has a name that XML and JSON must escape.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("a & <b>");
        TinyBert::new(24).write(&model);
        fs::write(dir.path().join("pairs.csv"), PAIRS).unwrap();
        fs::write(dir.path().join("texts.txt"), TEXTS).unwrap();
        Self { dir, model }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The command with these arguments, in the folder.
    fn command(&self, args: &str) -> Command {
        let mut command = command(["sensitivity", "--device", "cpu", "--threads", "1", "--model"]);
        command.arg(&self.model).args(args.split_whitespace()).current_dir(&self.dir);
        command
    }

    #[track_caller]
    fn fine(&self, args: &str) -> String {
        self.command(args).run().fine()
    }

    #[track_caller]
    fn refused(&self, args: &str) -> String {
        self.command(args).run().refused(1)
    }

    fn json(&self, name: &str) -> Value {
        json(&self.path(name))
    }
}

fn rows(json: &Value) -> Vec<(String, u64, f64)> {
    let row = |row: &Value| {
        let layer = row["layer"].as_str().unwrap().to_owned();
        (layer, row["vector"].as_u64().unwrap(), row["drop"].as_f64().unwrap())
    };
    json["rows"].as_array().unwrap().iter().map(row).collect()
}

#[test]
fn the_table_and_both_files_have_every_layer_in_every_pattern_that_fits() {
    let place = Place::new();
    let text = place.fine("--pairs pairs.csv --vector 1,4,32 --json out.json --plot out.svg");
    let json = place.json("out.json");
    assert_eq!(json["schema"], "sparse24-sensitivity/1");
    assert_eq!((&json["settings"]["metric"], &json["settings"]["method"]), (&"spearman".into(), &"magnitude".into()));
    assert_eq!(json["linear_weights"], 2 * (4 * 40 * 40 + 2 * 40 * 72));
    assert!(json["dense"].as_f64().unwrap().abs() <= 1.0);
    let rows = rows(&json);
    let mut expected = Vec::new();
    for i in 0..2 {
        // 32 does not divide the 40 rows of each of Q, K and V.
        for (name, vectors) in [
            ("attention.self.qkv", [1, 4, 8]),
            ("attention.output.dense", [1, 4, 32]),
            ("intermediate.dense", [1, 4, 32]),
            ("output.dense", [1, 4, 32]),
        ] {
            expected.extend(vectors.map(|v| (format!("encoder.layer.{i}.{name}"), v)));
        }
    }
    assert_eq!(rows.iter().map(|(layer, v, _)| (layer.clone(), *v)).collect::<Vec<_>>(), expected);
    assert!(rows.iter().any(|(.., drop)| *drop != 0.0));

    // Every row is in the table, least harm for its weights first.
    let cells = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let table: Vec<_> = cells.filter(|cells| cells.len() == 7 && cells[0].starts_with("encoder.")).collect();
    assert_eq!(table.len(), rows.len(), "{text}");
    let harm: Vec<f64> = table.iter().map(|cells| cells[6].parse().unwrap()).collect();
    assert!(harm.is_sorted() && harm[0] < harm[harm.len() - 1], "{text}");
    let (layer, v, drop) = &rows[0];
    let row = table.iter().find(|cells| cells[0] == layer && cells[1] == v.to_string()).unwrap();
    assert_eq!((row[2].trim_start_matches('~'), row[4]), (format!("{drop:.6}").as_str(), "19.74"));
    // Those within noise are marked: in the table, in what it says below, in the file and in the plot.
    let noise: Vec<_> = json["rows"].as_array().unwrap().iter().filter(|row| row["within_noise"] == true).collect();
    assert!(!noise.is_empty(), "eight pairs show the largest drops at most: {text}");
    assert_eq!(table.iter().filter(|cells| cells[2].starts_with('~')).count(), noise.len(), "{text}");
    assert!(text.contains(&format!("{} of {} drops ", noise.len(), rows.len())), "{text}");
    for row in json["rows"].as_array().unwrap() {
        let [low, drop, high] =
            [&row["interval"]["low"], &row["drop"], &row["interval"]["high"]].map(|x| x.as_f64().unwrap());
        assert!(low <= drop && drop <= high, "{row}");
        assert_eq!(row["within_noise"], low <= 0.0 && 0.0 <= high, "{row}");
    }

    let svg = fs::read_to_string(place.path("out.svg")).unwrap();
    well_formed(&svg);
    let legend = 4;
    assert_eq!(svg.matches("<circle").count(), rows.len() + legend, "{svg}");
    let hollow =
        svg.split("<circle").skip(1).filter(|circle| circle.split('>').next().unwrap().contains("fill=\"none\""));
    assert_eq!(hollow.count(), noise.len(), "{svg}");

    // Every text's embedding is another one: no drop of the cosine is noise.
    let text = place.fine("--input texts.txt --vector 1 --json cosine.json");
    assert!(text.contains("\nno drop is within noise\n"), "{text}");
    for row in place.json("cosine.json")["rows"].as_array().unwrap() {
        assert!(row["interval"]["low"].as_f64().unwrap() > 0.0 && row["within_noise"] == false, "{row}");
    }
    for text in ["a &amp; &lt;b&gt;: one linear layer", "encoder.layer.1.output.dense", "V = 32", "(no unit)"] {
        assert!(svg.contains(text), "{text} is not in {svg}");
    }
}

/// Tags open and close in pairs, and no text or attribute has an `&` that begins no entity.
#[track_caller]
fn well_formed(xml: &str) {
    let mut open = Vec::new();
    let (first, rest) = xml.trim().split_once('<').unwrap();
    assert_eq!(first, "");
    for part in rest.split('<') {
        let (tag, text) = part.split_once('>').unwrap_or_else(|| panic!("no end of <{part}"));
        assert!(!text.contains('>'), "{part}");
        for entity in part.split('&').skip(1) {
            let name = entity.split_once(';').map(|(name, _)| name);
            assert!(name.is_some_and(|n| ["amp", "lt", "gt", "quot", "apos"].contains(&n)), "{part}");
        }
        assert!(tag.matches('"').count().is_multiple_of(2), "{tag}");
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name.trim()), "{part}"),
            None if tag.ends_with('/') || tag.starts_with(['?', '!']) => {}
            None => open.push(tag.split_whitespace().next().unwrap()),
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

/// Each drop against the f64 twin of the model with that layer alone pruned.
#[test]
fn drops_are_those_of_a_model_with_that_layer_alone_pruned() {
    let place = Place::new();
    place.fine("--input texts.txt --vector 1,32 --json out.json");
    let json = place.json("out.json");
    assert_eq!((&json["settings"]["metric"], json["dense"].as_f64().unwrap().round()), (&"cosine".into(), 1.0));
    let files = Files::in_folder(&place.model);
    let graph = models::load(&files.config).unwrap();
    let texts: Vec<_> = TEXTS.lines().collect();
    let ids = Tokenizer::load(&files.tokenizer, graph.limits()).unwrap().encode(&texts).unwrap().ids;
    let dense = Checkpoint::load(graph, &files.weights, None, DType::F32).unwrap();
    let expected = twin::embeddings(&dense, &Pipeline::default(), &ids).unwrap();
    for (layer, vector, drop) in rows(&json) {
        let (_, w) = dense.linears().find(|(name, _)| *name == layer).unwrap();
        let w = w.to_dense().unwrap();
        let mask = prune::magnitude(&w, VectorLen::new(vector as usize).unwrap()).unwrap();
        let mut pruned = dense.clone();
        pruned.set_linear(&layer, Sparse24::compress(&w, &mask).unwrap().into()).unwrap();
        let cosines =
            (&twin::embeddings(&pruned, &Pipeline::default(), &ids).unwrap() * &expected).sum() / texts.len() as f64;
        assert!((drop - (1.0 - cosines)).abs() < 1e-5, "{layer} at V={vector}: {drop}, {}", 1.0 - cosines);
        assert!(drop > 1e-4, "{layer} at V={vector}: {drop}");
    }
}

#[test]
fn an_interrupted_run_goes_on_where_it_stopped() {
    let place = Place::new();
    let args = "--pairs pairs.csv --vector 1,4 --json out.json";
    let text = place.fine(args);
    let whole = fs::read_to_string(place.path("out.json")).unwrap();

    // Rows are taken from the file as they are: this number is not measured.
    let mut json: Value = serde_json::from_str(&whole).unwrap();
    json["rows"][1]["drop"] = 0.125.into();
    let known = json.clone();
    json["rows"].as_array_mut().unwrap().truncate(5);
    json["rows"].as_array_mut().unwrap().remove(2);
    fs::write(place.path("out.json"), json.to_string()).unwrap();
    assert_ne!(place.fine(args), text);
    assert_eq!(place.json("out.json"), known);

    // A finished one is drawn at once, and by a copy of its inputs.
    fs::write(place.path("out.json"), &whole).unwrap();
    let copy = place.path("copy");
    TinyBert::new(24).write(&copy);
    fs::copy(place.path("pairs.csv"), place.path("other.csv")).unwrap();
    let copied = Place { dir: place.dir, model: copy };
    let again = copied.fine("--pairs other.csv --vector 1,4 --json out.json --plot later.svg");
    assert_eq!(again.split_once("\n").unwrap().1, text.split_once("\n").unwrap().1);
    assert_eq!(fs::read_to_string(copied.path("out.json")).unwrap(), whole);
    well_formed(&fs::read_to_string(copied.path("later.svg")).unwrap());
}

#[test]
fn other_settings_than_the_files_are_refused_by_name() {
    let place = Place::new();
    place.fine("--pairs pairs.csv --vector 4 --json out.json");
    let before = fs::read(place.path("out.json")).unwrap();
    fs::write(place.path("more.csv"), format!("{PAIRS}cat,dog,2\n")).unwrap();
    let differs = |args: &str| place.refused(&format!("{args} --vector 4 --json out.json"));
    let method = differs("--pairs pairs.csv --method magnitude-l2");
    assert!(method.ends_with("choose another name: method was \"magnitude\", is \"magnitude-l2\"\n"), "{method}");
    let texts = differs("--pairs more.csv");
    assert!(texts.contains("texts was") && !texts.contains("method was"), "{texts}");
    let both = differs("--input texts.txt --dtype f16");
    assert!(["metric was", "dtype was", "texts was"].iter().all(|field| both.contains(field)), "{both}");
    let mut other = TinyBert::new(24);
    *other.first("embeddings.word_embeddings.weight") += 1.0;
    other.write(&place.model);
    assert!(differs("--pairs pairs.csv").contains("model was"));
    assert_eq!(fs::read(place.path("out.json")).unwrap(), before);

    // Nor is a file overwritten that is none of these.
    for (text, error) in
        [("[]", "schema is null"), ("{\"schema\": ", "cannot be continued"), ("", "cannot be continued")]
    {
        fs::write(place.path("out.json"), text).unwrap();
        let stderr = differs("--pairs pairs.csv");
        assert!(stderr.contains(error), "{stderr}");
        assert_eq!(fs::read_to_string(place.path("out.json")).unwrap(), text);
    }
}

#[test]
fn methods_that_read_inputs_are_calibrated_once_for_all_patterns() {
    let place = Place::new();
    let drops = |args: &str| -> Vec<f64> {
        let out = place.path("out.json");
        let _ = fs::remove_file(&out);
        place.fine(&format!("{args} --input texts.txt --vector 1,4 --json out.json"));
        rows(&place.json("out.json")).into_iter().map(|(.., drop)| drop).collect()
    };
    let magnitude = drops("");
    let calibrated = drops("--method sparsegpt --calibration texts.txt");
    assert_eq!((magnitude.len(), calibrated.len()), (16, 16));
    let sum = |drops: &[f64]| drops.iter().sum::<f64>();
    assert!(sum(&calibrated) < 0.7 * sum(&magnitude), "{calibrated:?}\n{magnitude:?}");
    assert_ne!(drops("--method random"), drops("--method random --seed 7"));
}

#[test]
fn what_is_missing_or_of_no_use_is_said() {
    let place = Place::new();
    for (args, code, error) in [
        ("", 2, "--pairs or --input is needed"),
        ("--pairs none.csv", 1, "cannot read none.csv"),
        ("--pairs pairs.csv --method wanda", 2, "the method wanda needs --calibration"),
        ("--pairs pairs.csv --calibration texts.txt", 2, "the method magnitude reads no inputs"),
        ("--pairs pairs.csv --json out.txt", 2, "must end in .json"),
        ("--pairs pairs.csv --plot out.json", 2, "must end in .svg"),
        ("--pairs - --method wanda --calibration -", 2, "stdin can be read once: --pairs and --calibration are both"),
        ("--pairs pairs.csv --sparsity 2:4", 1, "has no dense linear layers to prune"),
        ("--pairs a --input b", 2, "cannot be used with"),
        ("--vector 3 --pairs pairs.csv", 2, "vector length 3"),
    ] {
        let stderr = place.command(args).run().refused(code);
        assert!(stderr.contains(error), "{args}: {stderr}");
    }
    let help = place.fine("--help");
    assert!(help.contains("Examples:\n  sparse24 sensitivity") && help.contains("--vector"), "{help}");
    assert!(!exists_other_than_inputs(place.dir.path()));
}

/// `-` is stdin and stdout, the old name of --vector works, and a run on another copy of the texts goes on.
#[test]
fn pairs_come_from_stdin_and_json_goes_to_stdout() {
    let place = Place::new();
    let table = place.fine("--pairs pairs.csv --vector 4 --json out.json");
    let whole = place.json("out.json");
    let from_stdin = |args: &str| place.command(args).run_on(PAIRS.as_bytes()).exits(0).0;
    let json: Value = serde_json::from_str(&from_stdin("--pairs - --vectors 4 --json")).unwrap();
    assert_eq!(json, whole);
    assert_eq!(from_stdin("--pairs - --vector 4 --json out.json"), table);
    assert_eq!(place.json("out.json"), whole);
}

/// A file from before there were intervals is taken as it is.
#[test]
fn rows_without_an_interval_are_shown_without_one() {
    let place = Place::new();
    place.fine("--pairs pairs.csv --vector 4 --json out.json");
    let mut old = place.json("out.json");
    for row in old["rows"].as_array_mut().unwrap() {
        let row = row.as_object_mut().unwrap();
        assert!(row.remove("interval").is_some() && row.remove("within_noise").is_some());
    }
    let settings = old["settings"].as_object_mut().unwrap();
    assert!(settings.remove("similarity").is_some() && settings.remove("prompt").is_some());
    fs::write(place.path("out.json"), old.to_string()).unwrap();
    let text = place.fine("--pairs pairs.csv --vector 4 --json out.json --plot out.svg");
    assert!(text.contains(" — ") && text.contains("\n8 of 8 drops have no interval"), "{text}");
    assert!(text.lines().all(|line| !line.contains("encoder.") || !line.contains('~')), "{text}");
    well_formed(&fs::read_to_string(place.path("out.svg")).unwrap());
}

/// Whether a run that failed left a file behind.
fn exists_other_than_inputs(dir: &Path) -> bool {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.into_iter().any(|name| !["a & <b>", "pairs.csv", "texts.txt"].contains(&name.as_str()))
}
