//! A report as one HTML page that needs nothing else: plots are drawn by uPlot (MIT, `assets/uPlot-LICENSE`), which is in it.

use std::fmt::Write as _;

use super::Report;

const PLOTS: &str = include_str!("../../assets/uPlot.iife.min.js");
const PLOTS_STYLE: &str = include_str!("../../assets/uPlot.min.css");
const SCRIPT: &str = include_str!("../../assets/page.js");
const STYLE: &str = include_str!("../../assets/page.css");

impl Report {
    /// The page; `title` says what was replayed.
    ///
    /// # Errors
    ///
    /// If the report cannot be written as JSON, which no report of a replay causes.
    pub fn page(&self, title: &str) -> Result<String, serde_json::Error> {
        // In a script element, only this sequence would end the data.
        let data = serde_json::to_string(self)?.replace("</", "<\\/");
        let mut rows = String::new();
        for row in self.table() {
            let cells: String = row.iter().map(|cell| format!("<td>{}</td>", escaped(cell))).collect();
            // Writing to a String cannot fail.
            let _ = writeln!(rows, "<tr>{cells}</tr>");
        }
        let heads: String = Self::HEADS.iter().map(|head| format!("<th>{head}</th>")).collect();
        let title = escaped(title);
        Ok(format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>rswap simulate: {title}</title>\n\
             <style>{PLOTS_STYLE}{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n\
             <p>What each policy would have done with the same demand. The oracle is no policy: it is what the demand costs where it is \
             cheapest at every moment, without moves; nothing can cost less without violations. Drag to zoom, double-click to go back.</p>\n\
             <div class=\"wide\"><table class=\"rows\"><thead><tr>{heads}</tr></thead><tbody>\n{rows}</tbody></table></div>\n\
             <div id=\"all\" class=\"plot\"></div>\n<div id=\"short\" class=\"plot\"></div>\n<div id=\"money\" class=\"plot\"></div>\n\
             <p><label>Instance <select id=\"instance\"></select></label></p>\n\
             <p class=\"key\">Moves:<span id=\"save\"></span><span id=\"forced\"></span><span id=\"failed\"></span></p>\n\
             <div id=\"one\" class=\"plot\"></div>\n<div id=\"place\" class=\"plot\"></div>\n\
             <script type=\"application/json\" id=\"report\">{data}</script>\n<script>{PLOTS}</script>\n<script>{SCRIPT}</script>\n\
             </body>\n</html>\n"
        ))
    }

    /// What the columns of [`Report::table`] are.
    pub const HEADS: [&str; 10] = [
        "policy",
        "money",
        "of it moves",
        "of it violations",
        "kWh",
        "violations %",
        "moves",
        "failed",
        "ping-pongs",
        "regret",
    ];

    /// The rows as text.
    pub fn table(&self) -> Vec<[String; 10]> {
        let rows = self.rows.iter().map(|row| {
            [
                row.policy.clone(),
                format!("{:.3}", row.money),
                format!("{:.3}", row.money_moves),
                format!("{:.3}", row.money_violations),
                row.kwh.map_or_else(|| "-".to_owned(), |kwh| format!("{kwh:.2}")),
                format!("{:.3}", row.violations * 100.0),
                row.moves.to_string(),
                row.failed.to_string(),
                row.ping_pongs.to_string(),
                format!("{:.3}", row.regret),
            ]
        });
        rows.collect()
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
